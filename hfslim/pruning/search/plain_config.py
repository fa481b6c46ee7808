"""What a family's own config can say of a smaller model."""

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
    """How wide the residual stream of a family may be, by its config.

    Attributes:
        sites: The places that are as wide as the stream.
        size: Units of each.
        entries: Dimensions per unit: more than one where a convolution groups them.
        heads: Units of attention heads of a layer.
        queries: Attention heads per unit.
        step: Units that go at once, so that a head's size divides the dimensions that are left.
        tied: Whether the size of a head is the width by the number of heads, so that heads have to
            go with the dimensions.
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

        Heads go only where they have to.
        """
        every = range(1, self.heads) if self.tied else (self.heads,)
        pairs = [(heads, width) for heads in every for width in self.widths(heads)]
        return [pair for pair in pairs if pair[1] < self.size]

    def widths(self, heads: int) -> list[int]:
        """Return the units of dimensions that a model of so many units of heads may keep."""
        if self.tied:
            left, rest = divmod(self.size * heads, self.heads)
            return [left] if rest == 0 and left % self.step == 0 else []
        fitting = range(self.step, self.size, self.step)
        number = heads * self.queries
        return [*(w for w in fitting if number and w * self.entries % number == 0), self.size]


def check_plain(model: PreTrainedModel, units: Units) -> Stream | None:
    """Check that a model's config can say that every layer has fewer units.

    Returns:
        How wide the residual stream may be, where dimensions may go.

    Raises:
        ValueError: It cannot for some kind of unit; the message says for which it can.
    """
    family = type(model).__name__
    if getattr(model.config, "hfslim", None):
        raise ValueError(
            f"uniform=True: this {family} was cut before to a structure that its config cannot say"
        )
    kinds = list(dict.fromkeys(site.kind for site in units))
    if "experts" in kinds:
        raise ValueError(
            "uniform=True is for heads, neurons, layers and dimensions: leave experts out"
        )
    stream = stream_of(model) if "dimensions" in kinds else None
    plain: list[Kind] = [
        kind for kind in kinds if kind != "dimensions" and _says_one_less(model, kind)
    ]
    if stream is not None and (not stream.tied or "heads" in kinds):
        told = {"dimensions", "heads"} if stream.tied else {"dimensions"}
        plain = [kind for kind in kinds if kind in told.union(plain)]
    if plain != kinds:
        wrong = [kind for kind in kinds if kind not in plain]
        fix = f"set units={plain}" if plain else "it can say nothing of what `units` names"
        if stream is not None and "dimensions" in wrong:
            fix = (
                f"a head's size is the width by the number of heads: set units={['heads', *kinds]}"
            )
        raise ValueError(
            f"uniform=True: the config of {family} cannot say that there are fewer {wrong}; {fix}"
        )
    return stream


def main_stream(units: Units) -> tuple[Site, ...]:
    """Return the residual stream, and the sites that are as wide; none where there is no stream."""
    wide = [site for site in units if site.kind == "dimensions"]
    if not wide:
        return ()
    main = max(wide, key=lambda site: len(site.feeds))
    return (main, *(s for s in wide if s is not main and _entries(s) == _entries(main)))


def _entries(site: Site) -> int:
    return site.size * sum(site.cuts[0].widths)


def stream_of(model: PreTrainedModel) -> Stream | None:
    """Find out how wide the config may say that the stream is; None if it can say nothing."""
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
            if _says(model, {"heads": heads_left, "dimensions": width}, stream):
                return stream
    return None


def _says_one_less(model: PreTrainedModel, kind: Kind) -> bool:
    """Tell whether the config can say that each site has a unit less."""
    return _says(model, {kind: -1})


def _says(model: PreTrainedModel, left: Mapping[Kind, int], stream: Stream | None = None) -> bool:
    """Cut a model without weights, and look at its config.

    The first units go, then the last: the layers of some families differ by their position.

    Args:
        model: The model.
        left: How many units each site of a kind keeps; of a negative number, how many fewer.
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
