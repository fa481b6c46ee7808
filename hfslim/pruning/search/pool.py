"""The units that a search may still keep, with their importance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from hfslim.anatomy.structure import Entry, Key, Kind, Structure
from hfslim.anatomy.units import Site, Units
from hfslim.pruning.search.price import dropped_layers
from hfslim.pruning.target import UnreachableTargetError


@dataclass(frozen=True)
class Candidate:
    """A unit that may be removed."""

    site: Site
    index: int
    score: float
    cost: int = 1

    @property
    def key(self) -> Key:
        """The kind and path of its site."""
        return self.site.kind, self.site.path

    @property
    def density(self) -> float:
        """Importance per cost."""
        return self.score / self.cost if self.cost else np.inf


class Pool:
    """The units that are left, with their importance.

    Args:
        units: The sites that may lose units.
        scores: Importance of each unit by site, `[units]`.
        within: A structure that the result must be part of; everything if not given.

    Attributes:
        layers_gone: Paths of the layers that are already removed.
        layers_to_go: Paths and scores of the layers that may be removed, the least important first;
            one of each list is not among them, so that no list becomes empty.
    """

    def __init__(
        self, units: Units, scores: Mapping[Key, torch.Tensor], within: Structure | None = None
    ) -> None:
        within = within or units.full()
        self.units = units
        self.scores = {key: value.tolist() for key, value in scores.items()}
        self.present = {s.key: within.kept(s.kind, s.path) for s in units}
        self.layers_gone = frozenset(dropped_layers(units, within))
        to_go = []
        for site in units:
            if site.kind == "layers":
                values = self.scores["layers", site.path]
                there = set(self.present["layers", site.path])
                free = sorted(there.intersection(site.removable), key=lambda i: (values[i], i))
                spare = len(free) - (0 if site.fixed else 1)
                to_go += [(f"{site.path}.{i}", values[i]) for i in free[:spare]]
        self.layers_to_go: list[tuple[str, float]] = sorted(to_go, key=lambda item: item[1])

    @cached_property
    def ranked(self) -> dict[Key, list[int]]:
        """The units of each site inside layers: fixed ones, then the most important first."""
        ranked: dict[Key, list[int]] = {}
        for site in self.units:
            if site.kind != "layers":
                key, fixed = site.key, set(site.fixed)
                values = self.scores[key]
                order = sorted(self.present[key], key=lambda i: (i not in fixed, -values[i], i))
                ranked[key] = order
        return ranked

    def candidates(
        self, kind: Kind, dropped: Set[str], unit_costs: Mapping[Key, int] | None = None
    ) -> list[Candidate]:
        """Return the removable units of a kind outside of dropped layers, the densest first."""
        result = []
        for site in self.units:
            if site.kind == kind and site.layer not in dropped:
                key, fixed = (kind, site.path), set(site.fixed)
                cost = 1 if unit_costs is None else unit_costs.get(key, 0)
                free = [i for i in self.present[key] if i not in fixed]
                result += [Candidate(site, i, self.scores[key][i], cost) for i in free]
        # The best unit of a site that must not become empty comes first.
        needed = (u for u in sorted(result, key=lambda u: u.score) if not u.site.fixed)
        best = {u.site: u for u in needed if u.site.needs_one}
        return sorted(result, key=lambda unit: (best.get(unit.site) != unit, -unit.density))

    def fewer_layers(self) -> Iterator[tuple[frozenset[str], float]]:
        """Yield the removed layers and the importance lost with them, one layer more each time."""
        dropped, lost = self.layers_gone, 0.0
        yield dropped, lost
        for path, score in self.layers_to_go:
            dropped, lost = dropped | {path}, lost + score
            yield dropped, lost

    def layers_at(self, sparsity: float) -> frozenset[str]:
        """Return the paths of the removed layers once a fraction of all layers is removed.

        Raises:
            UnreachableTargetError: Fewer may be removed.
        """
        total = sum(site.size for site in self.units if site.kind == "layers")
        number = round(sparsity * total) - len(self.layers_gone)
        if number > len(self.layers_to_go):
            raise UnreachableTargetError(
                f"target sparsity of layers {sparsity:g} cannot be reached: at most "
                f"{len(self.layers_to_go) + len(self.layers_gone)} of {total} layers may go"
            )
        return self.layers_gone | {path for path, _ in self.layers_to_go[: max(number, 0)]}

    def structure(self, kept: Mapping[Key, Iterable[int]], dropped: Set[str]) -> Structure:
        """Return the structure that keeps some units, and all layers but the dropped ones.

        A site that `kept` does not name keeps its fixed units only, a site in a dropped layer all
        that it has.
        """
        entries = []
        for site in self.units:
            key = site.key
            indices: Iterable[int] = self.present[key]
            if site.kind == "layers":
                indices = [i for i in indices if f"{site.path}.{i}" not in dropped]
            elif site.layer not in dropped:
                indices = kept.get(key, site.fixed)
            entries.append(Entry(site.kind, site.path, tuple(sorted(indices)), site.size))
        return Structure(tuple(entries))

    def keeping(self, candidates: Iterable[Candidate], dropped: Set[str]) -> Structure:
        """Return the structure that keeps some candidates, fixed units, and layers as above."""
        kept: dict[Key, list[int]] = {}
        for unit in candidates:
            kept.setdefault(unit.key, list(unit.site.fixed)).append(unit.index)
        return self.structure(kept, dropped)
