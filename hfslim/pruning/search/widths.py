"""Choose the width of every sub-layer, and the layers to keep, by a latency table."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hfslim.anatomy.structure import Key, Structure
from hfslim.anatomy.units import Site, Units
from hfslim.pruning.latency.latency_table import LatencyTable, layers_of
from hfslim.pruning.search.knapsack import choose, undominated
from hfslim.pruning.search.pool import Pool

STEPS = 10_000
"""Steps into which the budget is divided; costs are rounded up to them."""


@dataclass(frozen=True)
class _Option:
    """A choice for a layer: its cost, the importance lost, and the width of each site inside.

    Without widths the layer is removed.
    """

    ms: float
    loss: float
    widths: Mapping[Key, int] | None


def widths_within(pool: Pool, table: LatencyTable, ms: float) -> Structure | None:
    """Find the structure that loses the least importance and takes no longer than some time.

    A sub-layer may have any number of heads, or a number of neurons that the table steps by, none
    included. A layer may be removed whole, for the importance of the layer. The best combination is
    found exactly, up to a ten-thousandth of the budget. At a given width the most important units
    stay, of equal ones those with the lower index.

    Returns:
        The structure; None if there is none as fast as that.
    """
    budget = ms - table.outside
    if budget < 0:
        return None
    picked = _best(pool.units, _options(pool, table), budget)
    if picked is None:
        return None
    removed = {path for path, option in picked.items() if option.widths is None}
    widths = {k: w for option in picked.values() for k, w in (option.widths or {}).items()}
    kept = {key: pool.ranked[key][:width] for key, width in widths.items()}
    return pool.structure(kept, pool.layers_gone | removed)


def least_ms(units: Units, table: LatencyTable) -> float:
    """Return the time of the model by the table without anything that may be removed."""
    dropped = set()
    for site in units:
        if site.kind == "layers":
            cost = {i: table.layer[f"{site.path}.{i}"] for i in site.removable}
            stays = () if site.fixed else (min(cost, key=lambda i: cost[i]),)
            dropped |= {f"{site.path}.{i}" for i in cost if i not in stays}
    return table.outside + sum(ms for path, ms in table.layer.items() if path not in dropped)


def _options(pool: Pool, table: LatencyTable) -> dict[str, list[_Option]]:
    """Return the choices for each layer that is left, by its path."""
    removable = {
        f"{site.path}.{i}": pool.scores["layers", site.path][i]
        for site in pool.units
        if site.kind == "layers"
        for i in site.removable
    }
    options = {}
    for path, sites in layers_of(pool.units).items():
        if path not in pool.layers_gone:
            options[path] = _narrowed(pool, table, path, sites)
            if path in removable:
                options[path].append(_Option(0.0, removable[path], None))
    return options


def _narrowed(pool: Pool, table: LatencyTable, path: str, sites: Sequence[Site]) -> list[_Option]:
    """Return the combinations of widths in a layer that no other beats in both time and loss."""
    options = [_Option(table.layer[path], 0.0, {})]
    for site in sites:
        key = site.key
        values, ranked = pool.scores[key], pool.ranked[key]
        step = table.step if site.kind == "neurons" else 1
        every_width = sorted({*range(0, len(ranked), step), len(ranked)})
        widths = [width for width in every_width if width >= len(site.fixed)]
        lost = np.cumsum([0.0, *(values[i] for i in reversed(ranked))])[::-1]
        curve = table.site[key]
        every = [
            _Option(o.ms + curve.at(w), o.loss + float(lost[w]), {**(o.widths or {}), key: w})
            for o, w in itertools.product(options, widths)
        ]
        options = [every[i] for i in undominated([(o.ms, o.loss) for o in every])]
    return options


def _best(
    units: Units,
    options: Mapping[str, Sequence[_Option]],
    ms: float,
    staying: frozenset[str] = frozenset(),
) -> dict[str, _Option] | None:
    """Choose an option for each layer; the layers of `staying` are not removed."""
    groups = {
        path: [o for o in of_layer if o.widths is not None or path not in staying]
        for path, of_layer in options.items()
    }
    # The tolerance keeps a whole number of steps from becoming one more by rounding.
    costs = [
        [(math.ceil(o.ms / ms * STEPS - 1e-6) if ms else int(o.ms > 0), o.loss) for o in group]
        for group in groups.values()
    ]
    chosen = choose(costs, STEPS if ms else 0)
    if chosen is None:
        return None
    picked = {path: groups[path][i] for path, i in zip(groups, chosen, strict=True)}
    emptied = _emptied(units, picked)
    if not emptied:
        return picked
    tries = [_best(units, options, ms, staying | {path}) for path in emptied]
    possible = [found for found in tries if found is not None]
    return min(possible, key=lambda found: sum(o.loss for o in found.values()), default=None)


def _emptied(units: Units, picked: Mapping[str, _Option]) -> list[str]:
    """Return the layers of the first list that would lose all of them."""
    for site in units:
        if site.kind == "layers":
            left = [p for i in range(site.size) if (p := f"{site.path}.{i}") in picked]
            if all(picked[path].widths is None for path in left):
                return left
    return []
