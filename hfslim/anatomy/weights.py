"""The modules whose single weights can be removed, and the sparsity of their weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.model_state import check_state

logger = logging.getLogger(__name__)

Names = str | Sequence[str] | None
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
GROUP_SIZES = (2, 4, 8, 16)
INCOMPLETE = " but for incomplete groups"
"""Follows a pattern whose groups do not divide the inputs of all modules."""
SPARSE = 0.1
"""Fraction of zeros from which on a weight counts as sparse; dense weights have none."""


def find_weights(
    model: PreTrainedModel, target_modules: Names = None, exclude_modules: Names = None
) -> dict[str, nn.Module]:
    """Find the modules whose weights can be removed: linear layers and convolutions.

    Names work as in PEFT: a list holds whole paths or their last parts, a string is a regular
    expression that the whole path must match.

    Args:
        model: The model, not a wrapper. Weights that a cut left empty are skipped.
        target_modules: The modules; if not given, those of the encoder, without the classification
            head and modules named embedding. Norms and biases never lose weights.
        exclude_modules: Modules to leave out of these.

    Returns:
        Modules by path, in the model's order.

    Raises:
        TypeError: The model is a wrapper.
        ValueError: There are none, a name matches no module, or the weights are not plain
            parameters, as for `check_state`.
    """
    check_state(model)
    return _find(model, target_modules, exclude_modules)


def _find(
    model: PreTrainedModel, target_modules: Names = None, exclude_modules: Names = None
) -> dict[str, nn.Module]:
    """Find the modules of `find_weights` in a model in any state."""
    known = _weighted(model)
    if target_modules is None:
        inside = _encoders(model)
        chosen = [path for path in known if "embed" not in path and path.startswith(tuple(inside))]
    else:
        chosen = _named(known, target_modules, "target_modules")
    if exclude_modules is not None:
        left_out = set(_named(known, exclude_modules, "exclude_modules"))
        chosen = [path for path in chosen if path not in left_out]
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no linear layers or convolutions to prune with these "
            f"names; it has {list(known)[:5]} and {max(len(known) - 5, 0)} more: give "
            "target_modules"
        )
    return {path: known[path] for path in chosen}


def _weighted(model: nn.Module) -> dict[str, nn.Module]:
    """Return all linear layers and convolutions with weights of their own that are not empty."""
    known: dict[str, nn.Module] = {}
    seen = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, WEIGHTED) else None
        if weight is not None and weight.is_floating_point() and weight.numel():
            if id(weight) not in seen:
                known[path] = module
            seen.add(id(weight))
    return known


def weight_of(module: nn.Module) -> nn.Parameter:
    """Return the present weight of a module of `find_weights`."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def outputs_first(module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """Transpose a tensor in the shape of a module's weight to `[out, in, …]`, or back.

    Only `Conv1D`, the linear layer of GPT-2, has a weight `[in, out]`.
    """
    return tensor.T if isinstance(module, Conv1D) else tensor


@dataclass(frozen=True)
class WeightSparsity:
    """Sparsity of one kind of module, or of all.

    Attributes:
        kind: `attention`, `feed-forward`, `convolution`, `other linear` or `all`.
        weights: Number of weights.
        nonzero: Number of weights that are not zero.
        pattern: The N:M pattern of all modules that accounts for the zeros, or empty. Where M does
            not divide the inputs of a module, a note follows: the last group is then incomplete,
            and may be dense.
    """

    kind: str
    weights: int
    nonzero: int
    pattern: str

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.nonzero / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {**vars(self), "sparsity": self.sparsity}


def weight_sparsity(
    model: PreTrainedModel, target_modules: Names = None, exclude_modules: Names = None
) -> list[WeightSparsity]:
    """Measure the sparsity of a model's weights, by kind of module.

    Args:
        model: The model, pruned or not, loaded or in training.
        target_modules: The modules, as for `find_weights`.
        exclude_modules: Modules to leave out.

    Returns:
        One row for each kind of module, and a last row for all modules.

    Raises:
        ValueError: There are no such modules.
    """
    return _rows(model, find_weights(model, target_modules, exclude_modules))


def _rows(model: PreTrainedModel, weights: Mapping[str, nn.Module]) -> list[WeightSparsity]:
    kinds = _kinds(model, weights)
    rows = []
    for kind in (*dict.fromkeys(kinds.values()), "all"):
        zeros = [
            outputs_first(module, weight_of(module) == 0).detach()
            for path, module in weights.items()
            if kind in ("all", kinds[path])
        ]
        total = sum(one.numel() for one in zeros)
        gone = sum(int(one.sum()) for one in zeros)
        pattern = _common_pattern(zeros, gone / total)
        rows.append(WeightSparsity(kind, total, total - gone, pattern))
    return rows


def most_kept(zeros: torch.Tensor, size: int) -> int:
    """Return the largest number of nonzero weights in any group of `size` inputs."""
    return int(input_groups((~zeros).to(torch.uint8), size, 0).sum(-1).max())


def input_groups(values: torch.Tensor, size: int, filling: float) -> torch.Tensor:
    """Fold the inputs into groups, `[out, *kernel, groups, size]`, with the last one padded."""
    values = values.movedim(1, -1)
    short = -values.shape[-1] % size
    return torch.nn.functional.pad(values, (0, short), value=filling).unflatten(-1, (-1, size))


def sparse_modules(model: PreTrainedModel) -> list[str]:
    """Return the paths of all modules whose weights are sparse and not all zero."""
    zeros = {
        path: (weight_of(m) == 0).float().mean().item() for path, m in _weighted(model).items()
    }
    return [path for path, fraction in zeros.items() if SPARSE <= fraction < 1]


def zeros_of(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Return the rows of `weight_sparsity` for a report; empty if no weight is sparse."""
    return [row.to_dict() for row in _rows(model, _find(model))] if sparse_modules(model) else []


def _common_pattern(zeros: Sequence[torch.Tensor], sparsity: float) -> str:
    """Return the N:M pattern that accounts for nearly all zeros; some fit a pattern by chance."""
    for size in GROUP_SIZES if sparsity else ():
        kept = max(most_kept(one, size) for one in zeros)
        if 1 - kept / size >= 0.9 * sparsity:
            short = any(one.shape[1] % size for one in zeros)
            return f"{kept}:{size}" + (INCOMPLETE if short else "")
    return ""


def _kinds(model: PreTrainedModel, weights: Mapping[str, nn.Module]) -> dict[str, str]:
    names = {"heads": "attention", "neurons": "feed-forward"}
    of_units = {
        cut.module: names[site.kind]
        for site in find_units(model)
        if site.kind in names
        for cut in site.cuts
    }
    return {
        path: of_units.get(path) or ("other linear" if m.weight.ndim == 2 else "convolution")
        for path, m in weights.items()
    }


def _encoders(model: PreTrainedModel) -> list[str]:
    """Return the paths of the model without its classification head, each with a dot."""
    base = model.base_model
    if base is not model:
        return [f"{path}." for path, module in model.named_children() if module is base]
    return [f"{p}." for p, module in model.named_children() if isinstance(module, PreTrainedModel)]


def _named(known: Mapping[str, nn.Module], names: str | Sequence[str], argument: str) -> list[str]:
    if isinstance(names, str):
        found = [path for path in known if re.fullmatch(names, path)]
        missing = [] if found else [names]
    else:
        ends = {name: [p for p in known if p == name or p.endswith(f".{name}")] for name in names}
        missing = [name for name, paths in ends.items() if not paths]
        matched = {path for paths in ends.values() for path in paths}
        found = [path for path in known if path in matched]
    if missing:
        raise ValueError(
            f"{argument}: no linear layer or convolution is called {missing[0]!r}; there are "
            f"{sorted({path.rpartition('.')[2] for path in known})}"
        )
    return found
