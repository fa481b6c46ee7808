"""Prune a trained model in one call, with calibration data only."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from transformers import PreTrainedModel

from hfslim.anatomy.adapters import check_merged
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import Stated, stated_inputs
from hfslim.anatomy.structure import Kind, Structure
from hfslim.pruning.family import Member, PruneFamily, point
from hfslim.pruning.gates.gates import Key
from hfslim.pruning.latency.latency_search import LatencyTry
from hfslim.pruning.metric_drop import Evaluate, MetricTry, metric_of, smallest_within
from hfslim.pruning.obs.reconstruction import Reconstruction
from hfslim.pruning.scores.batches import Batches, class_numbers
from hfslim.pruning.scores.criteria import Criteria, criteria_by_kind, usual_criterion
from hfslim.pruning.search.plain_config import check_plain
from hfslim.pruning.steps import calibrate, check_reachable, cut, decide, price
from hfslim.pruning.target import Goal, Resource, Target

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruneResult:
    """What `prune` did.

    Attributes:
        structure: The units kept, by their numbers before the cut.
        model: The model, shrunk in place.
        scores: Importance of every unit by kind and site, `[units]`.
        tries: For a latency, what was timed until it was met; for a drop of a metric, what was
            evaluated.
    """

    structure: Structure
    model: PreTrainedModel
    scores: Mapping[Key, torch.Tensor]
    tries: tuple[LatencyTry, ...] | tuple[MetricTry, ...] = ()


@overload
def prune(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    target: Mapping[str, Any] | None = None,
    units: Sequence[Kind] = ...,
    criterion: Criteria | None = ...,
    inputs: Stated | None = None,
    max_examples: int = ...,
    seed: int = ...,
    progress: bool = ...,
    *,
    reconstruction: Reconstruction = "weights",
    max_metric_drop: float | None = None,
    family: None = None,
    resource: Resource | None = None,
    evaluate: Evaluate | None = None,
    uniform: bool = False,
    classes: Sequence[int | str] | None = None,
) -> PruneResult: ...


@overload
def prune(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    target: None = None,
    units: Sequence[Kind] = ...,
    criterion: Criteria | None = ...,
    inputs: Stated | None = None,
    max_examples: int = ...,
    seed: int = ...,
    progress: bool = ...,
    *,
    reconstruction: Reconstruction = "weights",
    max_metric_drop: None = None,
    family: Sequence[float],
    resource: Resource | None = None,
    evaluate: Evaluate | None = None,
    uniform: bool = False,
    classes: Sequence[int | str] | None = None,
) -> PruneFamily: ...


def prune(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    target: Mapping[str, Any] | None = None,
    units: Sequence[Kind] = ("heads", "neurons"),
    criterion: Criteria | None = None,
    inputs: Stated | None = None,
    max_examples: int = 512,
    seed: int = 0,
    progress: bool = True,
    *,
    reconstruction: Reconstruction = "weights",
    max_metric_drop: float | None = None,
    family: Sequence[float] | None = None,
    resource: Resource | None = None,
    evaluate: Evaluate | None = None,
    uniform: bool = False,
    classes: Sequence[int | str] | None = None,
) -> PruneResult | PruneFamily:
    """Cut a trained classifier without training: to a target, or as far as a metric allows.

    Scores every unit on calibration data, searches the structure of greatest importance that meets
    the target, lets the weights that stay make up for those that go, and shrinks the model, in
    place. Under several processes all ranks get the same model, from the examples of all. What is
    asked for is one of `target`, `max_metric_drop` and `family`.

    Args:
        model: The classifier; not a wrapper around it.
        data: Batches of model inputs, with or without `labels`: a DataLoader, or a list of dicts.
        target: `{"macs": f}`, `{"parameters": f}` or `{"latency": f}`, the fraction of the whole
            model's figure to keep, latency as measured on the model's device at `inputs`; or
            `{"sparsity": f}` or `{"sparsity": {kind: f}}`, the fraction of units to remove.
        units: Kinds of units that may go: `heads`, `neurons`, `channels`, `experts`, `layers`,
            `dimensions` of the residual stream.
        criterion: A name of `hfslim.pruning.CRITERIA`, which tells its source, the kinds of units
            that it is for and whether it needs labels; a dict gives each kind its own. `obs` if
            not given, `fisher` where dimensions, experts or neurons inside them may go.
        inputs: The input at which multiply-accumulates are counted and latency is measured, as
            tensors or as shapes such as `{"input_ids": [1, 128]}`; one example of `example_inputs`
            if not given.
        max_examples: Calibration examples to use at most, on each rank.
        seed: Seed of whatever is drawn.
        progress: Whether to show a progress bar.
        reconstruction: How the layers that take heads, neurons and channels make up for what goes:
            `weights` solves for all their weights by least squares, `scales` for one factor per
            unit that stays, `none` leaves them.
        max_metric_drop: How much lower what `evaluate` returns may get, absolutely. The smallest
            model that stays within it is found by six evaluations. Hold data out from `evaluate`
            to check the promise on.
        family: Fractions to keep, such as `[0.75, 0.5, 0.25]`: a cut copy for each, from one
            scoring; the model stays whole.
        resource: What the fractions of `family`, or of the search for `max_metric_drop`, are of:
            `macs` if not given, `parameters` or `latency`.
        evaluate: Returns a metric of a model, higher is better.
        uniform: Whether every layer keeps the same number of heads and of neurons, so that the
            stock config tells the structure and the model loads without hfslim.
        classes: Numbers or names of the classes to keep best: only their examples calibrate. All if
            not given.

    Returns:
        The structure, the model, the scores and what was tried; of `family`, the members with what
        each costs.

    Raises:
        TypeError: The model is no module, or a wrapper around one.
        UnreachableTargetError: The target is below what can be reached; the message says what can.
        ValueError: An argument is wrong or conflicts with another, the data is empty, or scores or
            the metric are not finite. The model is unchanged.
        RuntimeError: The cut model would not equal the gated one. The model is unchanged.
    """
    goal = Goal.parse(target, max_metric_drop, family, resource, evaluate is not None, units)
    chosen = None if classes is None else class_numbers(model.config, classes)
    batches = Batches(data, max_examples, chosen)
    check_merged(model)
    everything = find_units(model, "dimensions" in units)
    sites = everything.of(units)
    stream = check_plain(model, sites) if uniform else None
    criteria = criteria_by_kind(criterion or usual_criterion(units, sites=everything), units)
    costs = price(model, sites, goal.targets[0], inputs, progress)
    least = min(goal.targets, key=lambda one: one.kept)
    check_reachable(model, sites, least, costs, inputs, uniform, stream)
    calibration = calibrate(model, sites, batches, criteria, seed, progress, reconstruction)

    def found(one: Target) -> tuple[Structure, tuple[LatencyTry, ...]]:
        return decide(model, calibration, one, costs, inputs, uniform, stream)

    def cut_copy(structure: Structure) -> PreTrainedModel:
        small = copy.deepcopy(model)
        cut(small, structure, calibration)
        return small

    if family is not None:
        return _family(model, goal, found, cut_copy, stated_inputs(model, inputs), evaluate)
    if max_metric_drop is None:
        structure, tries = found(goal.targets[0])
        cut(model, structure, calibration)
        return PruneResult(structure, model, calibration.scores, tries)
    assert evaluate is not None
    smallest, evaluated = smallest_within(
        model, max_metric_drop, evaluate, lambda kept: found(goal.at(kept))[0], cut_copy
    )
    if smallest is None:
        logger.warning(
            "every cut that was tried loses more than %g, so the model stays whole", max_metric_drop
        )
        smallest = sites.full()
    cut(model, smallest, calibration)
    return PruneResult(smallest, model, calibration.scores, tuple(evaluated))


def _family(
    model: PreTrainedModel,
    goal: Goal,
    found: Callable[[Target], tuple[Structure, tuple[LatencyTry, ...]]],
    cut_copy: Callable[[Structure], PreTrainedModel],
    inputs: Mapping[str, torch.Tensor],
    evaluate: Evaluate | None,
) -> PruneFamily:
    """Make the members one by one, and measure each."""
    members = []
    for target in goal.targets:
        structure, _ = found(target)
        small = cut_copy(structure)
        metric = metric_of(small, evaluate) if evaluate else None
        members.append(Member(target.kept, structure, small, point(model, small, inputs, metric)))
        logger.info("keeps %g of the %s: %s", target.kept, target.resource, members[-1].point)
    whole = metric_of(model, evaluate) if evaluate else None
    return PruneFamily(goal.targets[0].resource, whole, tuple(members))
