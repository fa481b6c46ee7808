"""Choose one option of each group under a budget: the multiple-choice knapsack, solved exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def choose(groups: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int] | None:
    """Pick one option of each group so that costs fit a budget and the summed loss is least.

    A dynamic programme over the groups, as ZipLM picks the width of every sub-layer (Kurtic et al.
    2023, arXiv 2302.04089, section 3.2). Ties are broken by the order of groups and options alone,
    so the same numbers give the same choice everywhere.

    Args:
        groups: Cost (0 or more) and loss of each option, group by group.
        budget: The largest total cost.

    Returns:
        The index of the chosen option of each group; None if even the cheapest cost too much.

    Examples:
        >>> choose([[(3, 0.0), (1, 0.5)], [(4, 0.0), (2, 0.1), (0, 2.0)]], budget=5)
        [0, 1]
        >>> choose([[(3, 0.0)], [(4, 0.0)]], budget=5) is None
        True
    """
    if budget < 0:
        return None
    best = np.zeros(budget + 1)  # least loss on the groups so far, by the budget spent on them
    picks = []
    for group in groups:
        reached, pick = np.full(budget + 1, np.inf), np.full(budget + 1, -1)
        for index in undominated(group):
            cost, loss = group[index]
            if cost > budget:
                continue
            candidate = best[: budget + 1 - cost] + loss
            better = candidate < reached[cost:]
            reached[cost:][better] = candidate[better]
            pick[cost:][better] = index
        best = reached
        picks.append(pick)
    if not np.isfinite(best[-1]):
        return None
    chosen = []
    for group, pick in zip(reversed(groups), reversed(picks), strict=True):
        chosen.append(int(pick[budget]))
        budget -= group[chosen[-1]][0]
    return chosen[::-1]


def undominated(options: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the options that no other beats in both cost and loss, ascending.

    Examples:
        >>> undominated([(3, 0.0), (2, 0.5), (2, 0.7), (1, 0.5)])
        [0, 3]
    """
    kept, least = [], np.inf
    for index in sorted(range(len(options)), key=lambda i: (*options[i], i)):
        if options[index][1] < least:
            kept.append(index)
            least = options[index][1]
    return sorted(kept)
