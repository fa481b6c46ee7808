"""Choose what to lose where units share their costs: a channel costs as much as it meets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import numpy as np

from hfslim.prune.costs import Costs, Product
from hfslim.prune.gates import Key


def numbers_to_lose(
    costs: Costs,
    scores: Mapping[Key, Sequence[float]],
    gone: Mapping[Key, int],
    dropped: Set[str],
    excess: int,
) -> tuple[dict[Key, int], int]:
    """Tell how many more units each site loses, so that the cost falls by some amount.

    One unit goes after the other, each time the one that loses the least importance for what its
    removal saves now: as channels go, those that they meet get cheaper. Costs are exact
    throughout. If the last one saves more than was needed, others that fit come back.

    Args:
        costs: What units cost.
        scores: Importance of the units that may go, site by site, the first to go first.
        gone: How many units each site lacks already.
        dropped: Layers that are gone, with all that is in them.
        excess: By how much the cost has to fall.

    Returns:
        The number of units to lose by site, and what that saves: less than `excess` where all
        that may go is too little.
    """
    keys = list(scores)
    order = {key: i for i, key in enumerate(keys)}
    now = dict(gone)
    around: dict[Key, list[Product]] = {key: [] for key in keys}
    for product in costs.left_in(dropped):
        for key in product.sites & set(keys):
            around[key].append(product)
    lost = dict.fromkeys(keys, 0)

    def saves(key: Key, more: int = 1) -> int:
        then = {**now, key: now.get(key, 0) + more}
        shared = sum(one.at(now) - one.at(then) for one in around[key])
        return shared + more * costs.unit.get(key, 0)

    def change(key: Key, more: int) -> int:
        saved = saves(key, more)
        lost[key] += more
        now[key] = now.get(key, 0) + more
        return saved

    def density(key: Key) -> float:
        left = scores[key][lost[key] : lost[key] + 1]
        saved = saves(key) if left else 0
        return left[0] / saved if saved else np.inf

    densities = np.array([density(key) for key in keys])
    saved = 0
    while saved < excess and len(keys):
        best = int(densities.argmin())
        if densities[best] == np.inf:
            break
        key = keys[best]
        saved += change(key, 1)
        met = {other for product in around[key] for other in product.sites if other in order}
        for other in met | {key}:
            densities[order[other]] = density(other)
    while back := [k for k in keys if lost[k] and 0 <= -saves(k, -1) <= saved - excess]:
        saved += change(max(back, key=lambda k: scores[k][lost[k] - 1]), -1)
    return lost, saved
