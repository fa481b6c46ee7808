"""Prune a trained model in one call, with calibration data only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hfslim.anatomy import Stated, find_units
from hfslim.prune.batches import Batches
from hfslim.prune.criteria import Criteria, criteria_by_kind
from hfslim.prune.gates import Key
from hfslim.prune.measured import LatencyTry
from hfslim.prune.steps import calibrate, check_reachable, cut, decide, price
from hfslim.prune.target import Target
from hfslim.structure import Kind, Structure


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
