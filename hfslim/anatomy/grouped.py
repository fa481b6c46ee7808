"""Units between grouped convolutions: each unit has channels in every group."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hfslim.anatomy.projections import Projection
from hfslim.anatomy.slices import Cut, Feed


def groups_of(projections: Sequence[Projection]) -> int:
    """Return the number of blocks of channels that lose the same units; 0 without convolutions."""
    convolved = any(one.groups for one in projections)
    return math.lcm(*(one.groups or 1 for one in projections)) if convolved else 0


def cuts_of(
    makers: Sequence[Projection], taker: Projection, blocks: int, width: int
) -> tuple[Cut, ...]:
    """Return the cuts of the convolutions around the units.

    Args:
        makers: The convolutions whose outputs hold the units.
        taker: The convolution that takes them; its weight has the inputs of a single group.
        blocks: Number of blocks of channels.
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
