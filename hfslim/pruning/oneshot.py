"""Prune a trained model in one call, with calibration data only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from transformers import PreTrainedModel

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import Stated
from hfslim.anatomy.structure import Key, Kind, Structure
from hfslim.pruning.latency.latency_search import LatencyTry
from hfslim.pruning.obs.reconstruction import Reconstruction
from hfslim.pruning.scores.batches import Batches, class_numbers
from hfslim.pruning.scores.criteria import Criteria, criteria_by_kind, usual_criterion
from hfslim.pruning.search.search import Search
from hfslim.pruning.steps import (
    Calibration,
    calibrate,
    check_prunable,
    check_reachable,
    cut,
    decide,
)
from hfslim.pruning.target import Target

if TYPE_CHECKING:
    from hfslim.pruning.metric_drop import MetricTry

MAX_EXAMPLES = 512
"""Calibration examples to use at most, on each rank, unless `Batches` set their own limit."""


@dataclass(frozen=True, repr=False)
class PruneResult:
    """The outcome of `prune` or `prune_within`.

    Attributes:
        structure: The units kept, by their numbers before the cut.
        model: The model, shrunk in place.
        scores: Importance of every unit by kind and site, `[units]`.
        tries: Under a latency, what was timed until it was met; under a metric drop, what was
            evaluated.
    """

    structure: Structure
    model: PreTrainedModel
    scores: Mapping[Key, torch.Tensor]
    tries: tuple[LatencyTry, ...] | tuple[MetricTry, ...] = ()

    def __repr__(self) -> str:
        tried = f", after {len(self.tries)} tries" if self.tries else ""
        parameters = sum(one.numel() for one in self.model.parameters())
        name = type(self.model).__name__
        return f"PruneResult({self.structure} of {name}, {parameters:,} parameters{tried})"


class PruneOptions(TypedDict, total=False):
    """The arguments of `prune` that `prune_family` and `prune_within` take by name."""

    units: Sequence[Kind]
    criterion: Criteria | None
    inputs: Stated | None
    seed: int
    progress: bool
    reconstruction: Reconstruction
    uniform: bool
    classes: Sequence[int | str] | None


def prune(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    target: Mapping[str, Any],
    units: Sequence[Kind] = ("heads", "neurons"),
    criterion: Criteria | None = None,
    inputs: Stated | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
    reconstruction: Reconstruction = "weights",
    uniform: bool = False,
    classes: Sequence[int | str] | None = None,
) -> PruneResult:
    """Cut a trained classifier to a target, without training.

    Scores every unit on calibration data, searches the structure of greatest importance that meets
    the target, lets the remaining weights compensate for the removed units, and shrinks the model
    in place. Under several processes all ranks get the same model, from the examples of all.
    `prune_family` cuts copies to several targets, `prune_within` as far as a metric allows.

    Args:
        model: The classifier; not a wrapper around it.
        data: Batches of model inputs, with or without `labels`: a DataLoader, or a list of dicts.
            The first 512 examples of each rank are used; `hfslim.pruning.Batches(data, 2048)` sets
            another limit.
        target: `{"macs": f}`, `{"parameters": f}` or `{"latency": f}`, the fraction of the whole
            model's figure to keep, latency as measured on the model's device at `inputs`; or
            `{"sparsity": f}` or `{"sparsity": {kind: f}}`, the fraction of units to remove.
        units: Kinds of units that may be removed: `heads`, `neurons`, `channels`, `experts`,
            `layers`, `dimensions` of the residual stream.
        criterion: A name of `hfslim.pruning.CRITERIA`, which gives its source, its kinds of units
            and whether it needs labels; a dict gives each kind its own. `obs` if not given,
            `fisher` where dimensions, experts or neurons inside experts may be removed.
        inputs: The input at which multiply-accumulates are counted and latency is measured, as
            tensors or as shapes such as `{"input_ids": [1, 128]}`; one example of `example_inputs`
            if not given.
        seed: Seed of random scores.
        progress: Whether to show a progress bar.
        reconstruction: How the layers that take heads, neurons and channels compensate for removed
            ones: `weights` solves for all their weights by least squares, `scales` for one factor
            per remaining unit, `none` changes nothing.
        uniform: Whether every layer keeps the same number of heads and of neurons, so that the
            stock config expresses the structure and the model loads without hfslim.
        classes: Numbers or names of the classes to keep best: only their examples calibrate. All if
            not given.

    Returns:
        The structure, the model, the scores and what was timed.

    Raises:
        TypeError: The model is no module, or a wrapper around one.
        UnreachableTargetError: The target is below what can be reached; the message gives the
            nearest that can.
        ValueError: An argument is wrong or conflicts with another, the model is no classifier or
            its weights are not plain parameters, the data is empty, or scores are not finite. The
            model is unchanged.
        RuntimeError: The cut model would not equal the gated one. The model is unchanged.
    """
    search, calibration = calibrated_search(
        model,
        data,
        Target.parse(target, units),
        *(units, criterion, inputs, seed, progress, reconstruction, uniform, classes),
    )
    structure, tries = decide(search, calibration.scores)
    cut(model, structure, calibration)
    return PruneResult(structure, model, calibration.scores, tries)


def calibrated_search(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    target: Target,
    units: Sequence[Kind] = ("heads", "neurons"),
    criterion: Criteria | None = None,
    inputs: Stated | None = None,
    seed: int = 0,
    progress: bool = True,
    reconstruction: Reconstruction = "weights",
    uniform: bool = False,
    classes: Sequence[int | str] | None = None,
) -> tuple[Search, Calibration]:
    """Check that a target can be met, and score the model; the arguments are those of `prune`."""
    check_prunable(model)
    most = data.max_examples if isinstance(data, Batches) else MAX_EXAMPLES
    chosen = None if classes is None else class_numbers(model.config, classes)
    batches = Batches(data, most, chosen)
    everything = find_units(model, "dimensions" in units)
    sites = everything.of(units)
    criteria = criteria_by_kind(criterion or usual_criterion(units, sites=everything), units)
    search = Search.priced(model, sites, target, inputs, uniform, progress)
    check_reachable(search)
    return search, calibrate(model, sites, batches, criteria, seed, progress, reconstruction)
