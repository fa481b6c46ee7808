"""Structures for tests: unequal layer by layer, with the hard cases in them."""

from __future__ import annotations

import random

from torch import nn

from hfslim.anatomy import find_units
from hfslim.structure import Structure


def uneven(model: nn.Module, seed: int = 0, drop_layer: bool = True) -> Structure:
    """Cut every site to another size: one without heads, one without neurons, one layer gone."""
    draw = random.Random(seed)
    units = find_units(model)
    sites: dict = {"heads": {}, "neurons": {}, "layers": {}}
    dropped = set()
    for site in units:
        if site.kind == "layers" and drop_layer and site.size > 1:
            gone = draw.choice(site.removable)
            dropped.add(f"{site.path}.{gone}")
            sites["layers"][site.path] = ([i for i in range(site.size) if i != gone], site.size)
    emptied = set()
    for site in units:
        if site.kind == "layers":
            continue
        size = draw.randint(1, max(site.size - 1, 1))
        if site.kind not in emptied and site.layer not in dropped:
            emptied.add(site.kind)
            size = 0
        kept = sorted(draw.sample(range(site.size), size))
        sites[site.kind][site.path] = (kept, site.size)
    return Structure.of(sites)
