"""Choose the units to remove where their costs depend on each other, as those of channels do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from hfslim.anatomy.structure import Key
from hfslim.pruning.search.unit_costs import Costs, Product


@dataclass(frozen=True)
class Lot:
    """Units of a site that are removed together: their number and summed importance."""

    number: int
    score: float


def lots(scores: Sequence[float], kept: int, step: int) -> list[Lot]:
    """Divide the units of a site so that a multiple of some number always remains.

    Args:
        scores: Importance of the units that may be removed, in the order of removal.
        kept: The number of units there are now.
        step: The number whose multiples are to remain.

    Examples:
        >>> [lot.number for lot in lots([1.0] * 19, kept=20, step=8)]
        [4, 8]
    """
    result, start, number = [], 0, kept % step or step
    while start + number <= len(scores):
        result.append(Lot(number, sum(scores[start : start + number])))
        start, number = start + number, step
    return result


def numbers_to_lose(
    costs: Costs,
    going: Mapping[Key, Sequence[Lot]],
    gone: Mapping[Key, int],
    dropped: Set[str],
    excess: int,
) -> tuple[dict[Key, int], int]:
    """Choose the number of units that each site loses, so that the cost falls by some amount.

    Lots are removed one by one, each time the one of least importance per cost that its removal
    saves now: without some channels, the tensors that they share with others get cheaper. Costs are
    exact throughout. If the last lot saves more than needed, others that fit are taken back.

    Args:
        costs: The costs of units.
        going: The units that may be removed, by site, in the order of removal.
        gone: The number of units that each site lacks already.
        dropped: Paths of the layers that are removed whole.
        excess: The amount by which the cost has to fall.

    Returns:
        The number of units to remove by site, and what that saves: less than `excess` if all
        removable units are too few.
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
