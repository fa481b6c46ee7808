"""Meet a latency by measurement: cut for a moment, time, correct the table, search again."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hfslim.anatomy import Units
from hfslim.prune.latency import LatencyTable
from hfslim.prune.proof import attention_returns
from hfslim.prune.surgery import cut_for_now
from hfslim.prune.target import Target
from hfslim.structure import Structure
from hfslim.timing import paired_latency

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
        predicted: Fraction of the whole model's latency by the table.
        measured: The measured fraction, a ratio of medians of calls in turn.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
    """

    predicted: float
    measured: float
    low: float
    high: float


def search_measured(
    model: PreTrainedModel,
    units: Units,
    target: Target,
    table: LatencyTable,
    inputs: Mapping[str, torch.Tensor],
    find: Callable[[LatencyTable], Structure],
) -> tuple[Structure, list[LatencyTry]]:
    """Find the structure that loses the least importance at a measured latency.

    A copy of the model, cut to what the search finds, is timed against the model, call by call.
    Where the table is off by more than `TOLERANCE`, the search runs again, at most `TRIES` times in
    all, for the saving by the table that measures as wanted, interpolated from all tries. A
    structure may be faster than asked for, where units or layers are too large to use up what is
    left.

    Args:
        model: The whole model.
        units: The sites that may lose units.
        target: The latency to reach.
        table: What the parts take.
        inputs: The input at which latency is stated.
        find: The search for the structure that meets the target by a table.

    Returns:
        The structure, the same on every rank, and what was tried. Where the last try is off too,
        the structure whose measured latency is nearest to the target, with a warning.

    Raises:
        UnreachableTargetError: The target is below what is left when everything that may go is
            gone, by the table or by the corrected one.
    """
    returns = attention_returns(model, units)
    found: list[tuple[LatencyTry, Structure]] = []
    wanted, savings = 1 - target.kept, [(0.0, 0.0)]
    for number in range(1, TRIES + 1):
        corrected = table.corrected(wanted / to_save(savings, wanted)) if wanted else table
        structure = find(corrected)
        if structure.is_full:
            return structure, []
        with cut_for_now(model, units, structure, returns):
            small = copy.deepcopy(model)
        predicted = corrected.of(units, structure) / table.total
        done = _time(predicted, model, small, inputs, table.total)
        found.append((done, structure))
        logger.info(
            "latency, try %d of %d: asked for %.3f, by the table %.3f, measured %.3f "
            "(%.3f to %.3f), keeps %s",
            *(number, TRIES, target.kept, predicted, done.measured, done.low, done.high, structure),
        )
        if abs(done.measured - predicted) <= TOLERANCE * target.kept:
            return structure, [done for done, _ in found]
        savings.append((1 - table.of(units, structure) / table.total, 1 - done.measured))
    done, structure = min(found, key=lambda item: abs(item[0].measured - target.kept))
    logger.warning(
        "after %d tries the latency is %.3f where %.3f was asked for; other work on the machine "
        "may be the reason",
        *(TRIES, done.measured, target.kept),
    )
    return structure, [done for done, _ in found]


def to_save(savings: Sequence[tuple[float, float]], wanted: float) -> float:
    """Tell what to save by a table so that a measured saving is met.

    Between the tries that measured next below and next above what is wanted it is interpolated;
    with none above, what is wanted by the table grows as the best measurement fell short.

    Args:
        savings: Fractions of the latency saved, by the table and as measured, from `(0, 0)` on.
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


def _time(
    predicted: float,
    whole: PreTrainedModel,
    small: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    ms: float,
) -> LatencyTry:
    """Time two models in turn on the first rank."""
    shared: list[Any] = [None]
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not several or torch.distributed.get_rank() == 0:
        calls = min(max(math.ceil(1000 * SECONDS / (2 * ms)), 20), 200)
        times = paired_latency(whole, small, inputs, calls=calls)
        shared = [LatencyTry(predicted, 1 / times.speedup, 1 / times.high, 1 / times.low)]
    if several:
        torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]
