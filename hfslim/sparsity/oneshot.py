"""Set single weights of a trained model to zero in one call, with calibration data only."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from hfslim.anatomy.adapters import check_merged
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
from hfslim.sparsity.weight_masks import Goal, Scope, remove
from hfslim.sparsity.weight_moments import from_matrices, gather_inputs, matrices, moments_size

logger = logging.getLogger(__name__)

Method = Literal["sparsegpt", "wanda", "magnitude"]
SCOPES: dict[str, tuple[Scope, ...]] = {
    "sparsegpt": ("layer",),
    "wanda": ("row", "layer"),
    "magnitude": ("global", "layer", "row"),
}
"""Within what weights can compete by each method; the first if not told. Of those that look at
inputs the scores of two modules are of different scales."""


@dataclass(frozen=True)
class SparsifyResult:
    """What `sparsify` did.

    Attributes:
        model: The model, changed in place.
        sparsity: Its zeros, by kind of module, as `weight_sparsity` tells them.
        errors: By path of a module, the mean square by which its outputs change, as a fraction of
            their variance; empty for magnitude, which sees no data.
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

    The zeros stand in the weights themselves, so saving and loading need nothing. Zeros that the
    model has count. To hold them in a later training, add `WeightPruningCallback()` to it. Under
    several processes all ranks get the same model, from the examples of all.

    Args:
        model: The classifier; not a wrapper around it.
        data: Batches of model inputs: a DataLoader, or a list of dicts; labels are not needed.
            Positions on which the decision does not depend, such as padding, count nothing.
        sparsity: Fraction of the weights to remove; or
        pattern: `"2:4"` or another N:M, at most N weights kept of each M consecutive inputs.
        method: `sparsegpt` removes the weights that cost least while the others of the row make up
            for them (Frantar and Alistarh 2023, arXiv 2301.00774); a position counts by how much
            the decision listens there, and biases make up for means. `wanda` removes the lowest
            |weight| · ‖input‖ (Sun et al. 2023, arXiv 2306.11695); `magnitude` the lowest |weight|,
            which needs no data.
        scope: Within what weights compete for a fraction: the inputs of one output (`row`), a
            module (`layer`) or the whole model (`global`). `layer` for sparsegpt, whose columns
            compete in blocks; `row` (default) or `layer` for wanda; `global` (default), `layer` or
            `row` for magnitude.
        max_examples: Calibration examples to use at most, on each rank.
        target_modules: The modules, as for `WeightPruningCallback`: names, or a regular expression;
            if not given, linear layers and convolutions of the encoder.
        exclude_modules: Modules to leave out of these.
        progress: Whether to show a progress bar.

    Returns:
        The model, its zeros, and the error of each module.

    Raises:
        TypeError: The model is no transformers model, but a wrapper around one, for instance.
        ValueError: An argument is wrong or conflicts with another, the data is missing, empty or no
            batches, a module is not reached, or a weight, an activation or a gradient is not
            finite. The model is unchanged.
        RuntimeError: The processes found different zeros.
    """
    goal = Goal.parse(sparsity, pattern)
    check_merged(model)
    scope = check_scope(method, scope)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"expected a transformers model, got {type(model).__name__}: pass the model inside a "
            "wrapper; merge adapters first (`merge_and_unload()`)"
        )
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
            f"method {method!r} looks at what modules get: give data, batches of model inputs, "
            "or use method='magnitude'"
        )
    else:
        batches, weighed = Batches(data, max_examples), method == "sparsegpt"
        settled = (
            partial(_solved, goal=goal) if weighed else partial(_weighed, goal=goal, scope=scope)
        )
        sizes, changes = {path: moments_size(module) for path, module in weights.items()}, {}
        for title, group in in_passes(sizes, model, method):
            moments = gather_inputs(model, weights, batches, weighed, progress, group, title)
            for path in group:
                changes[path] = settled(weights[path], moments.pop(path), held.zeros[path])
    held.add({path: change.zeros for path, change in changes.items()})
    for path, change in changes.items():
        change.make(weights[path])
    held.apply()
    logger.info("%s: %.2f %% of the weights are zero", method, 100 * held.fraction)
    errors = {path: one.error for path, one in changes.items() if one.error is not None}
    return SparsifyResult(model, weight_sparsity(model, target_modules, exclude_modules), errors)


def check_scope(method: str, scope: str | None) -> Scope:
    """Return the scope within which weights compete by a method.

    Raises:
        ValueError: There is no such method, or it has no such scope.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {list(get_args(Method))}, got {method!r}")
    scopes = SCOPES[method]
    if scope is not None and scope not in scopes:
        raise ValueError(f"scope of {method} must be one of {list(scopes)}, got {scope!r}")
    return next(one for one in scopes if scope in (None, one))


@dataclass(frozen=True)
class _Change:
    """What becomes of a module.

    Attributes:
        zeros: Where its weight is removed, in the shape of the weight.
        weight: Its weight, where more changes than that.
        bias: Its bias, where that changes.
        error: What `SparsifyResult` tells of it.
    """

    zeros: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    error: float | None = None

    def make(self, module: nn.Module) -> None:
        """Put the new weight and bias into the module; the zeros are held."""
        if self.weight is not None:
            weight_of(module).copy_(self.weight)
        if self.bias is not None:
            module.get_parameter("bias").copy_(self.bias)


def _by_magnitude(
    weights: Mapping[str, nn.Module], zeros: Mapping[str, torch.Tensor], goal: Goal, scope: Scope
) -> dict[str, _Change]:
    """Remove the lowest weights."""
    scores = {path: _scores(module, None) for path, module in weights.items()}
    before = {path: outputs_first(module, zeros[path]) for path, module in weights.items()}
    found = remove(scores, before, goal, scope)
    return {path: _Change(outputs_first(weights[path], gone)) for path, gone in found.items()}


def _weighed(
    module: nn.Module,
    moments: Sequence[InputMoments],
    zeros: torch.Tensor,
    goal: Goal,
    scope: Scope,
) -> _Change:
    """Remove a module's weights that are lowest times the norms of their inputs."""
    scores, before = _scores(module, moments), outputs_first(module, zeros)
    gone = outputs_first(module, remove({"": scores}, {"": before}, goal, scope)[""])
    lost = matrices(module, weight_of(module).masked_fill(~gone, 0)).double()
    return _Change(gone, error=_error(module, lost, moments, centred=False))


def _solved(
    module: nn.Module,
    moments: Sequence[InputMoments],
    zeros: torch.Tensor,
    goal: Goal,
) -> _Change:
    """Remove weights of a module while the others, and its bias, make up for them."""
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
