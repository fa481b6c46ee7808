"""Choose what to lose where units share their costs: a channel costs as much as it meets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from hfslim.pruning.gates.gates import Key
from hfslim.pruning.search.unit_costs import Costs, Product


@dataclass(frozen=True)
class Lot:
    """Units of a site that go together.

    Attributes:
        number: How many.
        score: Their importance.
    """

    number: int
    score: float


def lots(scores: Sequence[float], kept: int, step: int) -> list[Lot]:
    """Part the units of a site so that what stays is always a multiple of some number.

    Args:
        scores: Importance of the units that may go, the first to go first.
        kept: How many units there are now.
        step: The number whose multiples are to stay.

    Examples:
        >>> [lot.number for lot in lots([1.0] * 19, kept=20, step=8)]
        [4, 8]
    """

    def numbers() -> Iterator[int]:
        yield kept % step or step
        yield from itertools.repeat(step)

    result: list[Lot] = []
    start = 0
    for number in numbers():
        if start + number > len(scores):
            return result
        result.append(Lot(number, sum(scores[start : start + number])))
        start += number
    return result


def numbers_to_lose(
    costs: Costs,
    going: Mapping[Key, Sequence[Lot]],
    gone: Mapping[Key, int],
    dropped: Set[str],
    excess: int,
) -> tuple[dict[Key, int], int]:
    """Tell how many more units each site loses, so that the cost falls by some amount.

    One lot goes after the other, each time the one that loses the least importance for what its
    removal saves now: as channels go, those that they meet get cheaper. Costs are exact
    throughout. If the last one saves more than was needed, others that fit come back.

    Args:
        costs: What units cost.
        going: The units that may go, site by site, the first to go first.
        gone: How many units each site lacks already.
        dropped: Layers that are gone, with all that is in them.
        excess: By how much the cost has to fall.

    Returns:
        The number of units to lose by site, and what that saves: less than `excess` where all
        that may go is too little.
    """
    keys = list(going)
    order = {key: i for i, key in enumerate(keys)}
    now = dict(gone)
    around: dict[Key, list[Product]] = {key: [] for key in keys}
    for product in costs.left_in(dropped):
        for key in product.sites & set(keys):
            around[key].append(product)
    lost = dict.fromkeys(keys, 0)

    def saves(key: Key, more: int) -> int:
        then = {**now, key: now.get(key, 0) + more}
        shared = sum(one.at(now) - one.at(then) for one in around[key])
        return shared + more * costs.unit.get(key, 0)

    def change(key: Key, more: int) -> int:
        saved = saves(key, more)
        now[key] = now.get(key, 0) + more
        return saved

    def density(key: Key) -> float:
        left = going[key][lost[key] : lost[key] + 1]
        saved = saves(key, left[0].number) if left else 0
        return left[0].score / saved if saved else np.inf

    densities = np.array([density(key) for key in keys])
    saved = 0
    while saved < excess and len(keys):
        best = int(densities.argmin())
        if densities[best] == np.inf:
            break
        key = keys[best]
        saved += change(key, going[key][lost[key]].number)
        lost[key] += 1
        met = {other for product in around[key] for other in product.sites if other in order}
        for other in met | {key}:
            densities[order[other]] = density(other)

    def last(key: Key) -> Lot:
        return going[key][lost[key] - 1]

    def fits(key: Key) -> bool:
        return lost[key] > 0 and 0 <= -saves(key, -last(key).number) <= saved - excess

    while back := [key for key in keys if fits(key)]:
        key = max(back, key=lambda key: last(key).score)
        saved += change(key, -last(key).number)
        lost[key] -= 1
    return {key: sum(lot.number for lot in going[key][: lost[key]]) for key in keys}, saved
