"""Prune a trained model in one call, with calibration data only."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hfslim.anatomy import Stated, Units, find_units, stated_inputs
from hfslim.prune import costs as pricing
from hfslim.prune.batches import Batches
from hfslim.prune.collect import collect
from hfslim.prune.criteria import Criteria, criteria_by_kind
from hfslim.prune.gates import Key
from hfslim.prune.latency import LatencyTable
from hfslim.prune.measured import LatencyTry, search_measured
from hfslim.prune.search import search
from hfslim.prune.surgery import shrink
from hfslim.prune.target import Target
from hfslim.prune.timetable import latency_table
from hfslim.structure import Kind, Structure

logger = logging.getLogger(__name__)

Prices = pricing.Costs | LatencyTable | None
"""What units cost; None where a target counts units."""


@dataclass(frozen=True)
class PruneResult:
    """What `prune` did.

    Attributes:
        structure: The units kept, by their numbers before the cut.
        model: The model, shrunk in place.
        scores: Importance of every unit by kind and site, `[units]`.
        tries: For a latency, what was timed until it was met.
    """

    structure: Structure
    model: PreTrainedModel
    scores: Mapping[Key, torch.Tensor]
    tries: tuple[LatencyTry, ...] = ()


def prune(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    target: Mapping[str, Any],
    units: Sequence[Kind] = ("heads", "neurons"),
    criterion: Criteria = "fisher",
    inputs: Stated | None = None,
    max_examples: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> PruneResult:
    """Cut a trained classifier to a target, in place, without training.

    Scores every unit on calibration data, searches the structure of greatest importance that meets
    the target, and shrinks the model to it. Under several processes all ranks get the same
    structure, from the examples of all.

    Args:
        model: The classifier; not a wrapper around it.
        data: Batches of model inputs, with or without `labels`: a DataLoader, or a list of dicts.
        target: `{"macs": f}`, `{"parameters": f}` or `{"latency": f}`, the fraction of the whole
            model's figure to keep, latency as measured on the model's device at `inputs`; or
            `{"sparsity": f}` or `{"sparsity": {kind: f}}`, the fraction of units to remove.
        units: Kinds of units that may go: `heads`, `neurons`, `layers`.
        criterion: A name of `hfslim.prune.CRITERIA`, which tells its source, the kinds of units
            that it is for and whether it needs labels; a dict gives each kind its own.
        inputs: The input at which multiply-accumulates are counted and latency is measured, as
            tensors or as shapes such as `{"input_ids": [1, 128]}`; one example of `example_inputs`
            if not given.
        max_examples: Calibration examples to use at most, on each rank.
        seed: Seed of whatever is drawn.
        progress: Whether to show a progress bar.

    Returns:
        The structure, the model and the scores.

    Raises:
        TypeError: The model is no module, or a wrapper around one.
        UnreachableTargetError: The target is below what can be reached; the message says what can.
        ValueError: An argument is wrong, the data is empty, or scores are not finite. The model is
            unchanged.
        RuntimeError: The cut model would not equal the gated one. The model is unchanged.
    """
    batches = Batches(data, max_examples)
    sites = find_units(model).of(units)
    goal = Target.parse(target, units)
    criteria = criteria_by_kind(criterion, units)
    costs = price(model, sites, goal, inputs, progress)
    check_reachable(sites, goal, costs)
    calibration = calibrate(model, sites, batches, criteria, seed, progress)
    structure, tries = decide(model, calibration, goal, costs, inputs)
    cut(model, structure, calibration)
    return PruneResult(structure, model, calibration.scores, tries)


@dataclass(frozen=True)
class Calibration:
    """What calibration data told of a model: enough to cut it, or copies of it, to any target.

    Attributes:
        units: The sites that may lose units.
        scores: Importance of every unit by site, `[units]`.
        batches: The data.
    """

    units: Units
    scores: Mapping[Key, torch.Tensor]
    batches: Batches


def calibrate(
    model: PreTrainedModel,
    units: Units,
    batches: Batches,
    criteria: Mapping[Kind, str],
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Score the units of a model: the slow part of pruning, done once for any number of targets.

    Args:
        model: The model, not a wrapper; it is not changed.
        units: The sites that may lose units.
        batches: The calibration data.
        criteria: The criterion of each kind of unit.
        seed: Seed of whatever is drawn.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: The data is empty or does not fit, or scores are not finite.
    """
    return Calibration(units, collect(model, units, batches, criteria, seed, progress), batches)


def decide(
    model: PreTrainedModel,
    calibration: Calibration,
    target: Target,
    costs: Prices,
    inputs: Stated | None = None,
) -> tuple[Structure, tuple[LatencyTry, ...]]:
    """Choose the units to keep for a target; the same on every rank.

    Args:
        model: The model that was calibrated; it is not changed.
        calibration: What is known of it.
        target: What it may cost.
        costs: What its units cost.
        inputs: The input at which they cost that.

    Returns:
        The structure, and for a latency what was timed until it was met.

    Raises:
        UnreachableTargetError: The target cannot be met; the message says what can.
    """
    units, scores = calibration.units, calibration.scores
    tries: list[LatencyTry] = []
    if isinstance(costs, LatencyTable):
        stated = stated_inputs(model, inputs)
        structure, tries = search_measured(model, units, scores, target, costs, stated)
    else:
        structure = search(units, scores, target, costs)
    logger.info("keeps %s for %s", structure, target)
    return agreed(structure), tuple(tries)


def cut(model: PreTrainedModel, structure: Structure, calibration: Calibration) -> None:
    """Remove what a structure does not keep from the model that was calibrated, or a copy of it.

    Raises:
        RuntimeError: The cut model would not equal the gated one. The model is unchanged.
    """
    shrink(model, structure)


def price(
    model: PreTrainedModel,
    units: Units,
    target: Target,
    inputs: Stated | None = None,
    progress: bool = True,
) -> Prices:
    """Tell what units cost in a target's resource; None where the target is a sparsity.

    Latencies are measured, where the cache does not have them.
    """
    if target.resource == "sparsity":
        return None
    stated = stated_inputs(model, inputs)
    if target.resource == "latency":
        return latency_table(model, units, stated, progress)
    return pricing.count(model, units, target.resource, stated)


def agreed(structure: Structure) -> Structure:
    """Return the first rank's structure.

    Raises:
        RuntimeError: This rank found another one, so the ranks' weights have diverged.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return structure
    shared: list[Any] = [structure.to_dict()]
    torch.distributed.broadcast_object_list(shared, src=0)
    first = Structure.from_dict(shared[0])
    if first.digest() != structure.digest():
        raise RuntimeError(
            f"rank {torch.distributed.get_rank()} chose structure {structure.digest()}, rank 0 "
            f"{first.digest()}: the ranks' weights or scores have diverged"
        )
    return first


def check_reachable(units: Units, target: Target, costs: Prices) -> None:
    """Check that a target can be met, before any work is done.

    Raises:
        UnreachableTargetError: It cannot; the message says what can.
    """
    alike = {(s.kind, s.path): torch.ones(s.size, dtype=torch.float64) for s in units}
    search(units, alike, target, costs)
