"""Set single weights of a trained model to zero in one call, with calibration data only."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from hfslim.adapters import check_merged
from hfslim.prune.batches import Batches
from hfslim.prune.held_zeros import HeldZeros
from hfslim.prune.moments import InputMoments
from hfslim.prune.sparsegpt import sparsegpt
from hfslim.prune.weight_masks import Goal, Scope, remove
from hfslim.prune.weight_moments import from_matrices, gather_inputs, matrices
from hfslim.prune.weights import (
    Names,
    WeightSparsity,
    find_weights,
    outputs_first,
    weight_of,
    weight_sparsity,
)

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
    moments: dict[str, list[InputMoments]] = {}
    if method != "magnitude":
        if data is None:
            raise ValueError(
                f"method {method!r} looks at what modules get: give data, batches of model inputs, "
                "or use method='magnitude'"
            )
        batches = Batches(data, max_examples)
        moments = gather_inputs(model, weights, batches, method == "sparsegpt", progress)
    if method == "sparsegpt":
        solved = {p: _solved(m, moments[p], held.zeros[p], goal) for p, m in weights.items()}
        new = {path: weight for path, (weight, _) in solved.items()}
        zeros = {path: gone for path, (_, gone) in solved.items()}
    else:
        scores = {p: _scores(m, moments.get(p)) for p, m in weights.items()}
        before = {p: outputs_first(m, held.zeros[p]) for p, m in weights.items()}
        found = remove(scores, before, goal, scope)
        zeros = {p: outputs_first(m, found[p]) for p, m in weights.items()}
        new = {p: weight_of(m).masked_fill(zeros[p], 0) for p, m in weights.items()}
    held.add(zeros)
    errors = {}
    for path, module in weights.items():
        weight = weight_of(module)
        if path in moments:
            lost = matrices(module, weight).double() - matrices(module, new[path]).double()
            mends = method == "sparsegpt" and module.bias is not None
            errors[path] = _error(module, lost, moments[path], centred=mends)
            if mends:
                means = [m @ one.mean for m, one in zip(lost, moments[path], strict=True)]
                bias = module.get_parameter("bias")
                bias.copy_(bias + torch.cat(means).to(bias))
        weight.copy_(new[path])
    held.apply()
    logger.info("%s: %.2f %% of the weights are zero", method, 100 * held.fraction)
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


def _solved(
    module: nn.Module, moments: Sequence[InputMoments], zeros: torch.Tensor, goal: Goal
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a module's new weight and where it is removed."""
    weight = weight_of(module)
    channels = outputs_first(module, weight).shape[1]
    groups = zip(matrices(module, weight), matrices(module, zeros), moments, strict=True)
    solved = [
        sparsegpt(one.double(), seen.covariance(module.bias is not None), gone, goal, channels)
        for one, gone, seen in groups
    ]
    new, removed = (torch.stack(parts) for parts in zip(*solved, strict=True))
    return from_matrices(module, new).to(weight.dtype), from_matrices(module, removed)


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
