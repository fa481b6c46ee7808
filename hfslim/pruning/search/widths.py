"""Choose the width of every sub-layer, and the layers to keep, by a latency table."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hfslim.anatomy.structure import Entry, Structure
from hfslim.anatomy.units import Site, Units
from hfslim.pruning.gates.gates import Key
from hfslim.pruning.latency.latency_table import LatencyTable, dropped_layers, layers_of
from hfslim.pruning.search.knapsack import choose, undominated

STEPS = 10_000
"""Steps into which the budget is divided; costs are rounded up to them."""


@dataclass(frozen=True)
class _Option:
    """What may become of a layer: its cost, the importance lost, and the width of each site."""

    ms: float
    loss: float
    widths: Mapping[Key, int] | None


def widths_within(
    units: Units,
    scores: Mapping[Key, torch.Tensor],
    table: LatencyTable,
    ms: float,
    within: Structure,
) -> Structure | None:
    """Find the structure that loses the least importance and takes no longer than some time.

    Every sub-layer may have any number of heads, or any number of neurons that its device likes,
    none included; a layer may go whole, for the importance of the layer. The best combination is
    found exactly, up to a ten-thousandth of the budget. At a given width the most important units
    stay, of equal ones those with the lower index.

    Args:
        units: The sites that may lose units.
        scores: Importance of each unit by site, `[units]`.
        table: What the parts take.
        ms: Milliseconds that the model may take by the table.
        within: A structure that the result must be part of.

    Returns:
        The structure; None if there is none as fast as that.
    """
    budget = ms - table.outside
    if budget < 0:
        return None
    pool = _Pool(units, scores, table, within)
    picked = pool.best(budget)
    return None if picked is None else pool.structure(picked)


def least_ms(units: Units, table: LatencyTable) -> float:
    """Return what a model takes by the table when everything that may go is gone."""
    dropped = set()
    for site in units:
        if site.kind == "layers":
            cost = {i: table.layer[f"{site.path}.{i}"] for i in site.removable}
            stays = () if site.fixed else (min(cost, key=lambda i: cost[i]),)
            dropped |= {f"{site.path}.{i}" for i in cost if i not in stays}
    return table.outside + sum(ms for path, ms in table.layer.items() if path not in dropped)


class _Pool:
    """The units that are still there, the most important first, and what each layer may become."""

    def __init__(
        self,
        units: Units,
        scores: Mapping[Key, torch.Tensor],
        table: LatencyTable,
        within: Structure,
    ) -> None:
        self.units, self.table, self.within = units, table, within
        self.ranked: dict[Key, list[int]] = {}
        gone = dropped_layers(units, within)
        removable = {
            f"{site.path}.{i}": scores["layers", site.path][i].item()
            for site in units
            if site.kind == "layers"
            for i in site.removable
        }
        self.options: dict[str, list[_Option]] = {}
        for path, sites in layers_of(units).items():
            if path not in gone:
                self.options[path] = self._narrowed(path, sites, scores)
                if path in removable:
                    self.options[path].append(_Option(0.0, removable[path], None))

    def best(self, ms: float, staying: frozenset[str] = frozenset()) -> list[_Option] | None:
        """Choose what each layer becomes; those of `staying` are not dropped."""
        groups = {
            path: [o for o in options if o.widths is not None or path not in staying]
            for path, options in self.options.items()
        }
        # What is a whole number of steps may not become one more by rounding.
        costs = [
            [(math.ceil(o.ms / ms * STEPS - 1e-6) if ms else int(o.ms > 0), o.loss) for o in group]
            for group in groups.values()
        ]
        chosen = choose(costs, STEPS if ms else 0)
        if chosen is None:
            return None
        picked = [group[i] for group, i in zip(groups.values(), chosen, strict=True)]
        emptied = self._emptied(dict(zip(groups, picked, strict=True)))
        if not emptied:
            return picked
        tries = [self.best(ms, staying | {path}) for path in emptied]
        possible = [found for found in tries if found is not None]
        return min(possible, key=lambda found: sum(o.loss for o in found), default=None)

    def structure(self, picked: Sequence[_Option]) -> Structure:
        """Return the structure of a choice; units of dropped layers stay as they are."""
        become = dict(zip(self.options, picked, strict=True))
        dropped = {path for path, option in become.items() if option.widths is None}
        widths = {k: w for option in picked for k, w in (option.widths or {}).items()}
        entries = []
        for site in self.units:
            key = (site.kind, site.path)
            kept = self.within.kept(*key)
            if site.kind == "layers":
                kept = tuple(i for i in kept if f"{site.path}.{i}" not in dropped)
            elif key in widths:
                kept = tuple(sorted(self.ranked[key][: widths[key]]))
            entries.append(Entry(site.kind, site.path, kept, site.size))
        return Structure(tuple(entries))

    def _narrowed(
        self, path: str, sites: Sequence[Site], scores: Mapping[Key, torch.Tensor]
    ) -> list[_Option]:
        """List the combinations of widths in a layer that no other beats in time and loss."""
        options = [_Option(self.table.layer[path], 0.0, {})]
        for site in sites:
            key = (site.kind, site.path)
            values = scores[key].tolist()
            fixed = set(site.fixed)
            ranked = sorted(self.within.kept(*key), key=lambda i: (i not in fixed, -values[i], i))
            self.ranked[key] = ranked
            step = self.table.step if site.kind == "neurons" else 1
            every_width = sorted({*range(0, len(ranked), step), len(ranked)})
            widths = [width for width in every_width if width >= len(fixed)]
            lost = np.cumsum([0.0, *(values[i] for i in reversed(ranked))])[::-1]
            curve = self.table.site[key]
            every = [
                _Option(o.ms + curve.at(w), o.loss + float(lost[w]), {**(o.widths or {}), key: w})
                for o, w in itertools.product(options, widths)
            ]
            options = [every[i] for i in undominated([(o.ms, o.loss) for o in every])]
        return options

    def _emptied(self, become: Mapping[str, _Option]) -> list[str]:
        """Return the layers of the first list that would lose all of them."""
        for site in self.units:
            if site.kind == "layers":
                left = [p for i in range(site.size) if (p := f"{site.path}.{i}") in become]
                if all(become[path].widths is None for path in left):
                    return left
        return []
