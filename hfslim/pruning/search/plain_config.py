"""The smaller models that a family's own config can express."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.structure import Kind, Structure
from hfslim.anatomy.units import Site, Units
from hfslim.hub.format import blueprint
from hfslim.pruning.surgery.surgery import cut_for_now


@dataclass(frozen=True)
class Stream:
    """The widths of a family's residual stream that its config can express.

    Attributes:
        sites: Paths of the sites that are as wide as the stream.
        size: Number of units of each.
        entries: Dimensions per unit: more than one where a convolution groups them.
        heads: Number of units of attention heads in a layer.
        queries: Attention heads per unit.
        step: Units that are removed at once, so that the size of a head divides the remaining
            dimensions.
        tied: Whether the size of a head is the width by the number of heads, so that heads must be
            removed with the dimensions.
    """

    sites: tuple[str, ...]
    size: int
    entries: int
    heads: int
    queries: int
    step: int
    tied: bool

    @property
    def narrower(self) -> list[tuple[int, int]]:
        """The units of heads and of dimensions that narrower models keep, the widest last.

        Fewer heads only where `tied`.
        """
        every = range(1, self.heads) if self.tied else (self.heads,)
        pairs = [(heads, width) for heads in every for width in self.widths(heads)]
        return [pair for pair in pairs if pair[1] < self.size]

    def widths(self, heads: int) -> list[int]:
        """Return the numbers of units of dimensions that are possible at a number of head units."""
        if self.tied:
            left, rest = divmod(self.size * heads, self.heads)
            return [left] if rest == 0 and left % self.step == 0 else []
        fitting = range(self.step, self.size, self.step)
        number = heads * self.queries
        return [*(w for w in fitting if number and w * self.entries % number == 0), self.size]


def check_plain(model: PreTrainedModel, units: Units) -> Stream | None:
    """Check that a model's config can express fewer units in every layer.

    Returns:
        The possible widths of the residual stream, if `units` has dimensions.

    Raises:
        ValueError: It cannot for some kind of unit; the message names the kinds for which it can.
    """
    family = type(model).__name__
    if getattr(model.config, "hfslim", None):
        raise ValueError(
            f"uniform=True: this {family} was cut before, to what its config cannot express"
        )
    kinds = list(dict.fromkeys(site.kind for site in units))
    if "experts" in kinds:
        raise ValueError(
            "uniform=True is for heads, neurons, layers and dimensions: leave experts out"
        )
    stream = stream_of(model) if "dimensions" in kinds else None
    plain: list[Kind] = [
        kind for kind in kinds if kind != "dimensions" and _expresses(model, {kind: -1})
    ]
    if stream is not None and (not stream.tied or "heads" in kinds):
        more = {"dimensions", "heads"} if stream.tied else {"dimensions"}
        plain = [kind for kind in kinds if kind in more.union(plain)]
    if plain != kinds:
        wrong = [kind for kind in kinds if kind not in plain]
        fix = f"set units={plain}" if plain else "it can express none of the kinds in `units`"
        if stream is not None and "dimensions" in wrong:
            fix = (
                f"a head's size is the width by the number of heads: set units={['heads', *kinds]}"
            )
        raise ValueError(
            f"uniform=True: the config of {family} cannot express fewer {wrong}; {fix}"
        )
    return stream


def main_stream(units: Units) -> tuple[Site, ...]:
    """Return the site of the residual stream and the sites that are as wide, if there are any."""
    wide = [site for site in units if site.kind == "dimensions"]
    if not wide:
        return ()
    main = max(wide, key=lambda site: len(site.feeds))
    return (main, *(s for s in wide if s is not main and _entries(s) == _entries(main)))


def _entries(site: Site) -> int:
    return site.size * sum(site.cuts[0].widths)


def stream_of(model: PreTrainedModel) -> Stream | None:
    """Find the widths of the residual stream that the config can express, if there are any."""
    units = find_units(model, dimensions=True)
    wide = main_stream(units)
    attentions = {(s.size, s.heads.queries, s.width) for s in units if s.kind == "heads"}
    if not wide or len({site.size for site in wide}) > 1 or len(attentions) != 1:
        return None
    heads, queries, features = attentions.pop()
    entries = sum(wide[0].cuts[0].widths)
    step = math.lcm(features // queries, entries) // entries
    sites = tuple(site.path for site in wide)
    for tied in (False, True):
        stream = Stream(sites, wide[0].size, entries, heads, queries, step, tied)
        if stream.narrower:
            heads_left, width = stream.narrower[-1]
            if _expresses(model, {"heads": heads_left, "dimensions": width}, stream):
                return stream
    return None


def _expresses(
    model: PreTrainedModel, left: Mapping[Kind, int], stream: Stream | None = None
) -> bool:
    """Return whether the config can express a cut, by cutting a model without weights.

    The first units are removed, then the last: the layers of some families differ by position.

    Args:
        model: The model.
        left: Number of units that each site of a kind keeps; if negative, the number removed.
        stream: The sites of dimensions to cut.
    """
    sites = stream.sites if stream else ()
    for first in (True, False):
        empty = blueprint.stock_model(model, model.config)
        everything = find_units(empty, stream is not None)
        kept: dict[Kind, dict[str, tuple[list[int], int]]] = {kind: {} for kind in left}
        for site in everything:
            if site.kind in left and (site.kind != "dimensions" or site.path in sites):
                number = left[site.kind] if left[site.kind] > 0 else site.size + left[site.kind]
                order = site.removable if first else site.removable[::-1]
                going = order[: site.size - number]
                staying = [i for i in range(site.size) if i not in going]
                kept[site.kind][site.path] = staying, site.size
        structure = everything.complete(Structure.of(kept))
        with cut_for_now(empty, everything, structure, defaultdict(dict)):
            blueprint.describe(empty, everything, structure)
            if getattr(empty.config, "hfslim", None):
                return False
    return True
