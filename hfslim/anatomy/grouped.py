"""Units between convolutions in groups: those of one unit lie in every group, which stay equal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hfslim.anatomy.projections import Projection
from hfslim.anatomy.units import Cut, Feed


def groups_of(projections: Sequence[Projection]) -> int:
    """Return how many blocks of channels lose units alike; 0 where nothing is convolved."""
    convolved = any(one.groups for one in projections)
    return math.lcm(*(one.groups or 1 for one in projections)) if convolved else 0


def cuts_of(
    makers: Sequence[Projection], taker: Projection, blocks: int, width: int
) -> tuple[Cut, ...]:
    """Return what to cut.

    Args:
        makers: The convolutions that the units come out of.
        taker: The one that they go into; its weight has the inputs of a single group.
        blocks: Blocks of channels.
        width: Channels of a unit in each block.
    """
    inside = blocks // max(taker.groups, 1)
    return (
        *(cut for one in makers for cut in one.rows(*[width] * blocks)),
        *taker.columns(*[width] * inside),
    )


def feed_of(taker: Projection, blocks: int, width: int) -> Feed:
    """Return the input `[examples, channels, positions]` that carries the units."""
    return Feed(taker.path, dim=1, width=width, blocks=blocks)
