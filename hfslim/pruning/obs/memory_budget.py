"""How much memory statistics of a model may take at once."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Mapping
from typing import TypeVar

from torch import nn

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)

ROOM = 3 << 29
"""Bytes of statistics that are held at once, 1.5 GiB, or `SHARE` of the model's if that is more."""
SHARE = 0.25


def room_beside(model: nn.Module) -> int:
    """Return how many bytes of statistics may be held at once beside a model."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return max(ROOM, int(SHARE * weights))


def in_groups(sizes: Mapping[K, int], room: int) -> list[list[K]]:
    """Part what takes some bytes each into groups that have room, in order.

    What has no room is a group of its own.

    Examples:
        >>> in_groups({"a": 2, "b": 3, "c": 9, "d": 1}, 5)
        [['a', 'b'], ['c'], ['d']]
    """
    groups: list[list[K]] = []
    left = 0
    for name, size in sizes.items():
        if not groups or size > left:
            groups.append([])
            left = room
        groups[-1].append(name)
        left -= size
    return groups


def in_passes(
    sizes: Mapping[K, int], model: nn.Module, purpose: str
) -> Iterator[tuple[str, list[K]]]:
    """Yield groups of what takes some bytes each, that have room beside a model.

    Args:
        sizes: Bytes of second moments, by what they are of.
        model: The model.
        purpose: What they are for, for the log.

    Yields:
        What a progress bar may say, and a group.
    """
    room = room_beside(model)
    groups, title = in_groups(sizes, room), "second moments"
    if len(groups) > 1:
        logger.info(
            "second moments of %d modules take %.2f GiB, and %.2f GiB are held at once: %d passes "
            "over the calibration data for %s",
            *(len(sizes), sum(sizes.values()) / 2**30, room / 2**30, len(groups), purpose),
        )
    for number, group in enumerate(groups, 1):
        yield f"{title}, part {number} of {len(groups)}" if len(groups) > 1 else title, group
