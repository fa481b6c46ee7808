"""Removal of single weights of a trained model in one call, with calibration data only."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from hfslim.anatomy.model_state import check_classifier
from hfslim.anatomy.weights import (
    Names,
    WeightSparsity,
    find_weights,
    outputs_first,
    weight_of,
    weight_sparsity,
)
from hfslim.pruning.obs.memory_budget import in_passes
from hfslim.pruning.obs.moments import InputMoments
from hfslim.pruning.scores.batches import Batches
from hfslim.sparsity.held_zeros import HeldZeros
from hfslim.sparsity.sparsegpt import sparsegpt
from hfslim.sparsity.weight_masks import Scope, SparsityGoal, remove
from hfslim.sparsity.weight_moments import from_matrices, gather_inputs, matrices, moments_size

logger = logging.getLogger(__name__)

Method = Literal["sparsegpt", "wanda", "magnitude"]
METHOD_SCOPES: dict[str, tuple[Scope, ...]] = {
    "sparsegpt": ("layer",),
    "wanda": ("row", "layer"),
    "magnitude": ("global", "layer", "row"),
}
"""The scopes of each method; the first is the default. Scores that depend on inputs have different
scales in two modules, and so no global scope."""


@dataclass(frozen=True)
class SparsifyResult:
    """The result of `sparsify`.

    Attributes:
        model: The model, changed in place.
        sparsity: Its zeros by kind of module, from `weight_sparsity`.
        errors: By path of a module, the mean square change of its outputs as a fraction of their
            variance; empty for magnitude, which uses no data.
    """

    model: PreTrainedModel
    sparsity: list[WeightSparsity]
    errors: Mapping[str, float]


@torch.no_grad()
def sparsify(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]] | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    method: Method = "sparsegpt",
    scope: Scope | None = None,
    max_examples: int = 512,
    target_modules: Names = None,
    exclude_modules: Names = None,
    progress: bool = True,
) -> SparsifyResult:
    """Set single weights of a trained classifier to zero, without training, in place.

    The zeros are in the weights themselves, so saving and loading need nothing. Zeros that the
    model has count. To keep them in a later training, add `WeightPruningCallback()` to it. Under
    several processes all ranks get the same model, from the examples of all ranks.

    Args:
        model: The classifier; not a wrapper around it.
        data: Batches of model inputs: a DataLoader, or a list of dicts; labels are not needed.
            Positions on which the decision does not depend, such as padding, do not count.
        sparsity: Fraction of the weights to remove; or
        pattern: `"2:4"` or another N:M, at most N weights kept of each M consecutive inputs.
        method: `sparsegpt` removes the weights of least cost and updates the others of the row
            (Frantar and Alistarh 2023, arXiv 2301.00774), with positions weighted by the squared
            gradient of the decision; biases compensate means. `wanda` removes the lowest
            |weight| · ‖input‖ (Sun et al. 2023, arXiv 2306.11695); `magnitude` the lowest |weight|,
            which needs no data.
        scope: The set within which weights compete for a fraction: the inputs of one output
            (`row`), a module (`layer`) or the whole model (`global`). `layer` for sparsegpt, whose
            columns compete in blocks; `row` (default) or `layer` for wanda; `global` (default),
            `layer` or `row` for magnitude.
        max_examples: Maximum number of calibration examples, on each rank.
        target_modules: The modules, as for `WeightPruningCallback`: names, or a regular expression;
            by default linear layers and convolutions of the encoder.
        exclude_modules: Modules to exclude.
        progress: Whether to show a progress bar.

    Returns:
        The model, its zeros, and the error of each module.

    Raises:
        TypeError: The model is not a transformers model, but for instance a wrapper around one.
        ValueError: An argument is wrong or conflicts with another, the model is no classifier
            (`magnitude` takes any), its weights are not plain parameters, the data is missing or
            empty or not in batches, a module is not called, or a weight, an activation or a
            gradient is not finite. The model is unchanged.
        RuntimeError: The processes found different zeros.
    """
    goal = SparsityGoal.parse(sparsity, pattern)
    scope = check_scope(method, scope)
    if method != "magnitude":
        check_classifier(model)
    weights = find_weights(model, target_modules, exclude_modules)
    held = HeldZeros(model, weights)
    if held.fraction > goal.sparsity:
        raise ValueError(
            f"{held.fraction:.2%} of the weights are zero already, more than the "
            f"{goal.sparsity:.2%} asked for"
        )
    if method == "magnitude":
        changes = _by_magnitude(weights, held.zeros, goal, scope)
    elif data is None:
        raise ValueError(
            f"method {method!r} uses the inputs of modules: give data, batches of model inputs, "
            "or use method='magnitude'"
        )
    else:
        batches, solves = Batches(data, max_examples), method == "sparsegpt"
        change_of = (
            partial(_by_sparsegpt, goal=goal)
            if solves
            else partial(_by_wanda, goal=goal, scope=scope)
        )
        sizes, changes = {path: moments_size(module) for path, module in weights.items()}, {}
        for title, group in in_passes(sizes, model, method):
            moments = gather_inputs(model, weights, batches, solves, progress, group, title)
            for path in group:
                changes[path] = change_of(weights[path], moments.pop(path), held.zeros[path])
    held.add({path: change.zeros for path, change in changes.items()})
    for path, change in changes.items():
        change.make(weights[path])
    held.apply()
    logger.info("%s: %.2f %% of the weights are zero", method, 100 * held.fraction)
    errors = {path: one.error for path, one in changes.items() if one.error is not None}
    return SparsifyResult(model, weight_sparsity(model, target_modules, exclude_modules), errors)


def check_scope(method: str, scope: str | None) -> Scope:
    """Return the scope, or the method's default; raise a ValueError on a wrong method or scope."""
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {list(get_args(Method))}, got {method!r}")
    scopes = METHOD_SCOPES[method]
    if scope is not None and scope not in scopes:
        raise ValueError(f"scope of {method} must be one of {list(scopes)}, got {scope!r}")
    return next(one for one in scopes if scope in (None, one))


@dataclass(frozen=True)
class _Change:
    """The change of a module: removed weights, new weight and bias, and error in its outputs."""

    zeros: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    error: float | None = None

    def make(self, module: nn.Module) -> None:
        """Write the new weight and bias into the module; the zeros are set elsewhere."""
        if self.weight is not None:
            weight_of(module).copy_(self.weight)
        if self.bias is not None:
            module.get_parameter("bias").copy_(self.bias)


def _by_magnitude(
    weights: Mapping[str, nn.Module],
    zeros: Mapping[str, torch.Tensor],
    goal: SparsityGoal,
    scope: Scope,
) -> dict[str, _Change]:
    """Remove the lowest weights."""
    scores = {path: _scores(module, None) for path, module in weights.items()}
    before = {path: outputs_first(module, zeros[path]) for path, module in weights.items()}
    found = remove(scores, before, goal, scope)
    return {path: _Change(outputs_first(weights[path], gone)) for path, gone in found.items()}


def _by_wanda(
    module: nn.Module,
    moments: Sequence[InputMoments],
    zeros: torch.Tensor,
    goal: SparsityGoal,
    scope: Scope,
) -> _Change:
    """Remove a module's weights of the lowest |weight| · ‖input‖."""
    scores, before = _scores(module, moments), outputs_first(module, zeros)
    gone = outputs_first(module, remove({"": scores}, {"": before}, goal, scope)[""])
    lost = matrices(module, weight_of(module).masked_fill(~gone, 0)).double()
    return _Change(gone, error=_error(module, lost, moments, centred=False))


def _by_sparsegpt(
    module: nn.Module, moments: Sequence[InputMoments], zeros: torch.Tensor, goal: SparsityGoal
) -> _Change:
    """Remove weights of a module, and update the others and its bias."""
    weight = weight_of(module)
    bias: torch.Tensor | None = None if module.bias is None else module.get_parameter("bias")
    channels = outputs_first(module, weight).shape[1]
    groups = zip(matrices(module, weight), matrices(module, zeros), moments, strict=True)
    solved = [
        sparsegpt(one.double(), seen.covariance(bias is not None), gone, goal, channels)
        for one, gone, seen in groups
    ]
    parts, removed = (torch.stack(parts) for parts in zip(*solved, strict=True))
    new = from_matrices(module, parts).to(weight.dtype)
    lost = matrices(module, weight).double() - matrices(module, new).double()
    error = _error(module, lost, moments, centred=bias is not None)
    if bias is not None:
        means = [m @ one.mean for m, one in zip(lost, moments, strict=True)]
        bias = bias + torch.cat(means).to(bias)
    return _Change(from_matrices(module, removed), new, bias, error)


def _scores(module: nn.Module, moments: Sequence[InputMoments] | None) -> torch.Tensor:
    """Return |weight|, times the norms of the inputs if they are known, `[out, in, …]`."""
    scores = matrices(module, weight_of(module)).double().abs()
    if moments is not None:
        scores *= torch.stack([one.second.diagonal() for one in moments]).sqrt().unsqueeze(1)
    return outputs_first(module, from_matrices(module, scores))


def _error(
    module: nn.Module, lost: torch.Tensor, moments: Sequence[InputMoments], centred: bool
) -> float:
    """Return the mean square of `lost · x`, as a fraction of the variance of the outputs."""
    weight = matrices(module, weight_of(module)).double()
    change = total = 0.0
    for one, gone, seen in zip(weight, lost, moments, strict=True):
        change += float(((gone @ seen.covariance(centred, ridge=0.0)) * gone).sum())
        total += float(((one @ seen.covariance(True, ridge=0.0)) * one).sum())
    return change / max(total, 1e-300)
