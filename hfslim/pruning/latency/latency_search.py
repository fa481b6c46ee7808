"""Meet a latency by measurement: cut for a moment, time, correct the price, search again."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from hfslim.anatomy.structure import Key, Structure
from hfslim.measuring.timing import latency, paired_latency
from hfslim.pruning.search.search import Search
from hfslim.pruning.surgery.proof import Returns, attention_returns
from hfslim.pruning.surgery.surgery import cut_for_now
from hfslim.pruning.target import Target, UnreachableTargetError, unreachable
from hfslim.training.ranks import from_first_rank

logger = logging.getLogger(__name__)

TOLERANCE = 0.03
"""Allowed difference of measured and predicted latency, as a fraction of the target."""
TRIES = 5
SECONDS = 6.0
"""Time to measure a pair of models for, within 20 to 200 calls of each."""


@dataclass(frozen=True)
class LatencyTry:
    """A structure that was timed against the whole model.

    Attributes:
        predicted: Fraction of the whole model's latency by the price, as corrected by then.
        measured: The measured fraction, a ratio of medians of calls in turn.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
    """

    predicted: float
    measured: float
    low: float
    high: float


def search_measured(
    search: Search, scores: Mapping[Key, torch.Tensor]
) -> tuple[Structure, list[LatencyTry]]:
    """Find the structure that loses the least importance at a measured latency.

    A copy of the model, cut to the structure found, is timed against the model, call by call. Where
    prediction and measurement differ by more than `TOLERANCE`, the search runs again, at most
    `TRIES` times in all, for the saving by the price that measures as wanted, interpolated from all
    tries. A structure may be faster than asked for, where units or layers are too large to use up
    the rest of the budget.

    Returns:
        The structure, the same on every rank, and what was tried. Where the last try is off too,
        the structure whose measured latency is nearest to the target, with a warning.

    Raises:
        UnreachableTargetError: The target is below the latency measured without anything that may
            be removed.
    """
    returns = attention_returns(search.model, search.units)
    asked, price = search.target.kept, search.price
    found: list[tuple[LatencyTry, Structure]] = []
    wanted, savings = 1 - asked, [(0.0, 0.0)]
    for number in range(1, TRIES + 1):
        save = to_save(savings, wanted)
        structure, is_least = _within(search, scores, 1 - save)
        if structure.is_full:
            return structure, []
        saved = 1 - price.of(search.units, structure) / price.total
        predicted = 1 - saved * (wanted / save if save else 1.0)
        done = _time_cut(search, structure, returns, predicted)
        found.append((done, structure))
        logger.info(
            "latency, try %d of %d: asked for %.3f, by the %s %.3f, measured %.3f "
            "(%.3f to %.3f), keeps %s",
            *(number, TRIES, asked, price.resource, done.predicted),
            *(done.measured, done.low, done.high, structure),
        )
        if is_least and done.low > asked * (1 + TOLERANCE):
            raise unreachable(search.target, search.units, done.measured)
        if abs(done.measured - done.predicted) <= TOLERANCE * asked:
            return structure, [done for done, _ in found]
        savings.append((saved, 1 - done.measured))
    done, structure = min(found, key=lambda item: abs(item[0].measured - asked))
    logger.warning(
        "after %d tries the latency is %.3f where %.3f was asked for; other work on the machine "
        "may be the reason",
        *(TRIES, done.measured, asked),
    )
    return structure, [done for done, _ in found]


def check_measured(search: Search, scores: Mapping[Key, torch.Tensor]) -> None:
    """Check that a latency without a table can be met, by timing the model without its units.

    Raises:
        UnreachableTargetError: It cannot; the message gives the nearest that can.
        ValueError: None of the units costs anything.
    """
    structure, _ = _within(search, scores, 0.0)
    if structure.is_full:
        raise ValueError(
            f"none of the {sorted({site.kind for site in search.units})} that may go saves any "
            f"{search.price.resource}, so there is nothing to meet a latency by: give a target of "
            '"parameters" or "sparsity", or add kinds to `units`'
        )
    returns = attention_returns(search.model, search.units)
    done = _time_cut(search, structure, returns, search.target.kept)
    logger.info("latency: %.3f is left without any of the units that may go", done.measured)
    if done.low > search.target.kept * (1 + TOLERANCE):
        raise unreachable(search.target, search.units, done.measured)


def _within(
    search: Search, scores: Mapping[Key, torch.Tensor], kept: float
) -> tuple[Structure, bool]:
    """Return the structure that keeps a fraction by the price, or else the smallest one."""
    resource = search.price.resource
    try:
        return replace(search, target=Target(resource, kept)).structure(scores), False
    except UnreachableTargetError as error:
        return replace(search, target=Target(resource, error.least)).structure(scores), True


def to_save(savings: Sequence[tuple[float, float]], wanted: float) -> float:
    """Return the fraction to save by the price so that a measured saving is met.

    It is interpolated between the tries that measured next below and next above the wanted saving.
    With none above, it grows in the ratio in which the best measurement fell short.

    Args:
        savings: Fractions saved, by the price and as measured, from `(0, 0)` on.
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
    search: Search, structure: Structure, returns: Returns, predicted: float
) -> LatencyTry:
    """Time a model cut to a structure and the whole one in turn, on the first rank."""
    model = search.model

    def timed() -> LatencyTry:
        with cut_for_now(model, search.units, structure, returns):
            small = copy.deepcopy(model)
        ms = latency(model, search.inputs, calls=3, warmup=2).p50_ms
        calls = min(max(math.ceil(1000 * SECONDS / (2 * ms)), 20), 200)
        times = paired_latency(model, small, search.inputs, calls=calls)
        return LatencyTry(predicted, 1 / times.speedup, 1 / times.high, 1 / times.low)

    return from_first_rank(timed)
