"""Meet a latency by measurement: cut for a moment, time, correct the costs, search again."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hfslim.anatomy.structure import Structure
from hfslim.anatomy.units import Units
from hfslim.measuring.timing import latency, paired_latency
from hfslim.pruning.latency.latency_table import LatencyTable
from hfslim.pruning.search.unit_costs import Costs
from hfslim.pruning.surgery.proof import Returns, attention_returns
from hfslim.pruning.surgery.surgery import cut_for_now
from hfslim.pruning.target import Resource, Target, UnreachableTargetError, unreachable
from hfslim.training.ranks import from_first_rank

logger = logging.getLogger(__name__)

TOLERANCE = 0.03
"""Difference of measured and predicted latency, by the one asked for, that is good enough."""
TRIES = 5
SECONDS = 6.0
"""How long to time a pair of models, within 20 to 200 calls of each."""


@dataclass(frozen=True)
class LatencyTry:
    """A structure that was timed against the whole model.

    Attributes:
        predicted: Fraction of the whole model's latency by the costs, as corrected by then.
        measured: The measured fraction, a ratio of medians of calls in turn.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
    """

    predicted: float
    measured: float
    low: float
    high: float


Find = Callable[[Target], Structure]
"""The search for the structure of greatest importance that meets a target by known costs."""


def search_measured(
    model: PreTrainedModel,
    units: Units,
    target: Target,
    costs: Costs | LatencyTable,
    inputs: Mapping[str, torch.Tensor],
    find: Find,
) -> tuple[Structure, list[LatencyTry]]:
    """Find the structure that loses the least importance at a measured latency.

    A copy of the model, cut to what the search finds, is timed against the model, call by call.
    Where the costs are off by more than `TOLERANCE`, the search runs again, at most `TRIES` times
    in all, for the saving by the costs that measures as wanted, interpolated from all tries. A
    structure may be faster than asked for, where units or layers are too large to use up what is
    left.

    Args:
        model: The whole model.
        units: The sites that may lose units.
        target: The latency to reach.
        costs: What the parts take by the table, or what else they cost where there is none.
        inputs: The input at which latency is stated.
        find: The search for the structure that meets a target by these costs.

    Returns:
        The structure, the same on every rank, and what was tried. Where the last try is off too,
        the structure whose measured latency is nearest to the target, with a warning.

    Raises:
        UnreachableTargetError: The target is below what is measured when everything that may go is
            gone.
    """
    returns = attention_returns(model, units)
    found: list[tuple[LatencyTry, Structure]] = []
    wanted, savings = 1 - target.kept, [(0.0, 0.0)]
    for number in range(1, TRIES + 1):
        save = to_save(savings, wanted)
        structure, is_least = _within(costs, 1 - save, find)
        if structure.is_full:
            return structure, []
        saved = 1 - costs.of(units, structure) / costs.total
        predicted = 1 - saved * (wanted / save if save else 1.0)
        done = _time_cut(model, units, structure, inputs, returns, predicted)
        found.append((done, structure))
        logger.info(
            "latency, try %d of %d: asked for %.3f, by the %s %.3f, measured %.3f "
            "(%.3f to %.3f), keeps %s",
            *(number, TRIES, target.kept, _named(costs), done.predicted),
            *(done.measured, done.low, done.high, structure),
        )
        if is_least and done.low > target.kept * (1 + TOLERANCE):
            raise unreachable(target, units, done.measured)
        if abs(done.measured - done.predicted) <= TOLERANCE * target.kept:
            return structure, [done for done, _ in found]
        savings.append((saved, 1 - done.measured))
    done, structure = min(found, key=lambda item: abs(item[0].measured - target.kept))
    logger.warning(
        "after %d tries the latency is %.3f where %.3f was asked for; other work on the machine "
        "may be the reason",
        *(TRIES, done.measured, target.kept),
    )
    return structure, [done for done, _ in found]


def check_measured(
    model: PreTrainedModel,
    units: Units,
    target: Target,
    costs: Costs,
    inputs: Mapping[str, torch.Tensor],
    find: Find,
) -> None:
    """Check that a latency without a table can be met, by timing the model without its units.

    Args:
        model: The whole model.
        units: The sites that may lose units.
        target: The latency to reach.
        costs: What the units cost otherwise.
        inputs: The input at which latency is stated.
        find: The search for the structure that meets a target by these costs.

    Raises:
        UnreachableTargetError: It cannot; the message says what can.
        ValueError: None of the units costs anything.
    """
    structure, _ = _within(costs, 0.0, find)
    if structure.is_full:
        raise ValueError(
            f"none of the {sorted({site.kind for site in units})} that may go saves any "
            f"{costs.resource}, so there is nothing to meet a latency by: give a target of "
            '"parameters" or "sparsity", or add kinds to `units`'
        )
    returns = attention_returns(model, units)
    done = _time_cut(model, units, structure, inputs, returns, target.kept)
    logger.info("latency: %.3f is left without any of the units that may go", done.measured)
    if done.low > target.kept * (1 + TOLERANCE):
        raise unreachable(target, units, done.measured)


def _within(costs: Costs | LatencyTable, kept: float, find: Find) -> tuple[Structure, bool]:
    """Return the structure that keeps a fraction by the costs, or else the least there is."""
    resource = _named(costs)
    try:
        return find(Target(resource, kept)), False
    except UnreachableTargetError as error:
        return find(Target(resource, error.least)), True


def _named(costs: Costs | LatencyTable) -> Resource:
    return costs.resource if isinstance(costs, Costs) else "latency"


def to_save(savings: Sequence[tuple[float, float]], wanted: float) -> float:
    """Tell what to save by the costs so that a measured saving is met.

    Between the tries that measured next below and next above what is wanted it is interpolated;
    with none above, what is wanted by the costs grows as the best measurement fell short.

    Args:
        savings: Fractions saved, by the costs and as measured, from `(0, 0)` on.
        wanted: The fraction to save.

    Examples:
        >>> round(to_save([(0.0, 0.0)], 0.5), 3)
        0.5
        >>> round(to_save([(0.0, 0.0), (0.5, 0.4)], 0.5), 3)
        0.625
        >>> round(to_save([(0.0, 0.0), (0.5, 0.4), (0.6, 0.6)], 0.5), 3)
        0.55
    """
    below = max((s for s in savings if s[1] <= wanted), key=lambda saving: saving[1])
    above = [s for s in savings if s[1] > wanted]
    if above:
        nearest = min(above, key=lambda saving: saving[1])
        share = (wanted - below[1]) / (nearest[1] - below[1])
        return below[0] + share * (nearest[0] - below[0])
    return wanted * below[0] / max(below[1], 0.05) if below[0] else wanted


def _time_cut(
    model: PreTrainedModel,
    units: Units,
    structure: Structure,
    inputs: Mapping[str, torch.Tensor],
    returns: Returns,
    predicted: float,
) -> LatencyTry:
    """Time a model cut to a structure and the whole one in turn, on the first rank."""

    def timed() -> LatencyTry:
        with cut_for_now(model, units, structure, returns):
            small = copy.deepcopy(model)
        ms = latency(model, inputs, calls=3, warmup=2).p50_ms
        calls = min(max(math.ceil(1000 * SECONDS / (2 * ms)), 20), 200)
        times = paired_latency(model, small, inputs, calls=calls)
        return LatencyTry(predicted, 1 / times.speedup, 1 / times.high, 1 / times.low)

    return from_first_rank(timed)
