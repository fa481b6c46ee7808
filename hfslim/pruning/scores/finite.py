"""Tell where numbers stop being numbers, and where gradients end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hfslim.pruning.scores.importance import UnusableScoresError


def check_finite(model: nn.Module, inputs: Mapping[str, Any], logits: torch.Tensor) -> None:
    """Refuse logits that are not finite, and name the first module that they come from.

    Args:
        model: The model that computed them.
        inputs: What it computed them from; it is run once more to find the module.
        logits: Of any shape.

    Raises:
        UnusableScoresError: They are not.
    """
    if torch.isfinite(logits).all():
        return
    place = next((f"the input {n!r}" for n, v in inputs.items() if not _finite(v)), None)
    raise UnusableScoresError(
        f"{place or f'the output of {_first(model, inputs)!r}'} is not finite: check the model's "
        "weights and the calibration data for NaN and overflow"
    )


def check_gradients(model: nn.Module, logits: torch.Tensor) -> None:
    """Refuse logits that gradients do not pass from, as in a model that runs without them inside.

    Raises:
        UnusableScoresError: They do not.
    """
    if not logits.requires_grad:
        raise UnusableScoresError(
            f"{type(model).__name__} runs its layers without gradients, so none tells what units "
            "are worth: use criterion='activation' or 'magnitude' with reconstruction='none'"
        )


def _first(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Return the path of the first module to return what is not finite."""
    found: list[str] = []

    def hook(path: str) -> Callable[..., None]:
        def look(_: nn.Module, __: tuple, output: Any) -> None:
            if not found and not _finite(output):
                found.append(path)

        return look

    handles = [module.register_forward_hook(hook(path)) for path, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else type(model).__name__


def _finite(value: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
