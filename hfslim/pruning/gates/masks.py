"""Masks of 0 and 1: one entry per unit, expanded to the inputs of modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hfslim.anatomy.slices import Feed
from hfslim.anatomy.structure import Key
from hfslim.anatomy.units import Site


class Masks:
    """The closed units of each site."""

    def __init__(self) -> None:
        self._by_site: dict[Key, torch.Tensor] = {}
        self._spread: dict[tuple[Key, Feed], torch.Tensor] = {}

    def clear(self) -> None:
        """Open all units."""
        self._by_site.clear()
        self._spread.clear()

    def close(self, site: Site, kept: Sequence[int]) -> None:
        """Close all units of a site except those that are kept."""
        mask = torch.zeros(site.size)
        mask[list(kept)] = 1.0
        self._by_site[site.key] = mask

    def get(self, key: Key) -> torch.Tensor | None:
        """Return 0 or 1 for each unit of a site; None where all are open."""
        return self._by_site.get(key)

    def at(self, site: Site, feed: Feed, value: torch.Tensor) -> torch.Tensor | None:
        """Return the mask of an input; None where all units are open."""
        by_unit = self.get(site.key)
        if by_unit is None:
            return None
        key = site.key, feed
        mask = self._spread.get(key)
        if mask is None or mask.device != value.device or mask.dtype != value.dtype:
            mask = feed.spread(by_unit, value).to(value.dtype)
            self._spread[key] = mask
        return mask

    def apply(self, site: Site, feed: Feed, value: torch.Tensor) -> torch.Tensor:
        """Return an input with its closed units set to zero."""
        mask = self.at(site, feed, value)
        return value if mask is None else value * mask
