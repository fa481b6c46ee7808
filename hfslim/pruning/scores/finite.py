"""Checks of logits and gradients, which name the module that causes a failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from hfslim.pruning.scores.importance import UnusableScoresError


def check_finite(model: nn.Module, inputs: Mapping[str, Any], logits: torch.Tensor) -> None:
    """Raise an UnusableScoresError if logits are not finite, naming the first such module."""
    if torch.isfinite(logits).all():
        return
    place = next((f"the input {n!r}" for n, v in inputs.items() if not _finite(v)), None)
    place = place or f"the output of {_first(model, inputs)!r}"
    raise UnusableScoresError.not_finite(f"{place} is")


def check_gradients(model: nn.Module, logits: torch.Tensor) -> None:
    """Raise an UnusableScoresError if the model runs its layers without gradients."""
    if not logits.requires_grad:
        raise UnusableScoresError(
            f"{type(model).__name__} runs its layers without gradients, so units cannot be scored "
            "by them: use criterion='activation' or 'magnitude' with reconstruction='none'"
        )


def _first(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Return the path of the first module whose output is not finite."""
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
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
