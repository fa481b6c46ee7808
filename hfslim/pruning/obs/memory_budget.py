"""Memory budget of calibration statistics, and passes over data that keep to it."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Mapping
from typing import TypeVar

from torch import nn

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)

LEAST_BUDGET = 3 << 29
"""Bytes of statistics that are held at once, 1.5 GiB, or `MODEL_FRACTION` of the model if more."""
MODEL_FRACTION = 0.25


def statistics_budget(model: nn.Module) -> int:
    """Return how many bytes of statistics may be held at once beside a model."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return max(LEAST_BUDGET, int(MODEL_FRACTION * weights))


def in_groups(sizes: Mapping[K, int], budget: int) -> list[list[K]]:
    """Divide items of given sizes in bytes into groups within a budget, in order.

    An item above the budget is a group of its own.

    Examples:
        >>> in_groups({"a": 2, "b": 3, "c": 9, "d": 1}, 5)
        [['a', 'b'], ['c'], ['d']]
    """
    groups: list[list[K]] = []
    left = 0
    for name, size in sizes.items():
        if not groups or size > left:
            groups.append([])
            left = budget
        groups[-1].append(name)
        left -= size
    return groups


def in_passes(
    sizes: Mapping[K, int], model: nn.Module, purpose: str
) -> Iterator[tuple[str, list[K]]]:
    """Yield a progress bar's title and a group of modules or sites, for each pass over the data."""
    budget = statistics_budget(model)
    groups, title = in_groups(sizes, budget), "second moments"
    if len(groups) > 1:
        logger.info(
            "second moments of %d modules take %.2f GiB, and %.2f GiB are held at once: %d passes "
            "over the calibration data for %s",
            *(len(sizes), sum(sizes.values()) / 2**30, budget / 2**30, len(groups), purpose),
        )
    for number, group in enumerate(groups, 1):
        yield f"{title}, part {number} of {len(groups)}" if len(groups) > 1 else title, group
