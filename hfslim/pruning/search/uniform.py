"""Cuts that the stock config expresses: the same numbers of units in every layer."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping
from typing import Any

import torch

from hfslim.anatomy.structure import Entry, Kind, Structure
from hfslim.anatomy.units import Site, Units
from hfslim.pruning.gates.gates import Key
from hfslim.pruning.latency.latency_table import LatencyTable
from hfslim.pruning.search.plain_config import Stream
from hfslim.pruning.search.search import layers_to_go
from hfslim.pruning.search.unit_costs import Costs
from hfslim.pruning.target import Target, UnreachableTargetError, unreachable

Widths = Mapping[Kind, int]
"""How many units of each kind every layer keeps."""


def search_uniform(
    units: Units,
    scores: Mapping[Key, torch.Tensor],
    target: Target,
    costs: Costs | LatencyTable | None = None,
    stream: Stream | None = None,
) -> Structure:
    """Find the uniform structure that loses the least importance and meets a target.

    All layers keep the same number of heads and the same number of neurons, one or more, each layer
    its own most important ones; the least important layers may go, and the residual stream may
    become as narrow as the config can say.

    Args:
        units: The sites that may lose units.
        scores: Importance of each unit by site, `[units]`.
        target: What the model may cost.
        costs: What the units cost; needed unless the target is a sparsity.
        stream: How wide the residual stream may be; it stays whole if not given.

    Returns:
        The structure, over the sites of `units`.

    Raises:
        UnreachableTargetError: The target cannot be met; the message says what can.
        ValueError: The layers have different numbers of units.
    """
    step = costs.step if costs else 1
    pool = UniformPool(units, scores, step, stream)
    if costs is None:
        return pool.by_sparsity(target)
    budget = target.kept * costs.total * (1 + 1e-9)
    best: tuple[float, Structure] | None = None
    for number, (heads, dimensions) in itertools.product(
        range(len(pool.to_go) + 1), pool.heads_and_dimensions()
    ):
        dropped = frozenset(path for path, _ in pool.to_go[:number])

        def width(neurons: int, heads: int = heads, dimensions: int = dimensions) -> Widths:
            return {"heads": heads, "neurons": neurons, "dimensions": dimensions}

        def cost(neurons: int, dropped: frozenset[str] = dropped, at: Any = width) -> float:
            return costs.of(units, pool.structure(dropped, at(neurons)))

        affordable = bisect.bisect_right(pool.neurons, budget, key=cost)
        if affordable:
            widths = width(pool.neurons[affordable - 1])
            lost = pool.lost(number, widths)
            if best is None or lost < best[0]:
                best = lost, pool.structure(dropped, widths)
    if best is None:
        raise unreachable(target, units, costs.of(units, pool.least()) / costs.total)
    return best[1]


class UniformPool:
    """What may be kept: the same widths everywhere, and some of the layers.

    Args:
        units: The sites that may lose units.
        scores: Importance of each unit by site.
        step: Number of neurons that widths are multiples of.
        stream: How wide the residual stream may be.
    """

    def __init__(
        self,
        units: Units,
        scores: Mapping[Key, torch.Tensor],
        step: int = 1,
        stream: Stream | None = None,
    ) -> None:
        self.units, self.stream = units, stream
        self.to_go = layers_to_go(units, scores, units.full())
        self.sizes: dict[Kind, int] = {}
        self.ranked: dict[Key, list[int]] = {}
        self.scores = {key: value.tolist() for key, value in scores.items()}
        for site in units:
            if site.kind == "layers":
                continue
            values = self.scores[site.kind, site.path]
            fixed = set(site.fixed)
            ranked = sorted(range(site.size), key=lambda i: (i not in fixed, -values[i], i))
            self.ranked[site.kind, site.path] = ranked
            if self._stays_whole(site):
                continue
            if self.sizes.setdefault(site.kind, site.size) != site.size:
                raise ValueError(
                    f"equal layers need the same number of {site.kind} to begin with; "
                    f"{site.path!r} has {site.size}, others {self.sizes[site.kind]}"
                )
        size = self.sizes.get("neurons", 0)
        self.neurons = sorted({*range(step, size, step), size})

    def heads_and_dimensions(self) -> list[tuple[int, int]]:
        """List the numbers of heads and of dimensions that may be kept together, ascending."""
        size = self.sizes.get("heads", 0)
        heads = list(range(1, size + 1)) or [0]
        if self.stream is None or "dimensions" not in self.sizes:
            return [(number, self.sizes.get("dimensions", 0)) for number in heads]
        return [
            (number, width)
            for number in heads
            for width in self.stream.widths(number or self.stream.heads)
        ]

    def _stays_whole(self, site: Site) -> bool:
        sites = self.stream.sites if self.stream else ()
        return site.kind == "dimensions" and site.path not in sites

    def structure(self, dropped: frozenset[str], widths: Widths) -> Structure:
        """Return the structure; units of dropped layers stay as they are."""
        entries = []
        for site in self.units:
            kept = range(site.size)
            if site.kind == "layers":
                indices = [i for i in kept if f"{site.path}.{i}" not in dropped]
            elif site.layer in dropped or self._stays_whole(site):
                indices = list(kept)
            else:
                indices = sorted(self.ranked[site.kind, site.path][: widths[site.kind]])
            entries.append(Entry(site.kind, site.path, tuple(indices), site.size))
        return Structure(tuple(entries))

    def lost(self, layers: int, widths: Widths) -> float:
        """Return the importance of what is removed; units of dropped layers are not counted."""
        dropped = {path for path, _ in self.to_go[:layers]}
        lost = sum(score for _, score in self.to_go[:layers])
        for site in self.units:
            if site.kind != "layers" and site.layer not in dropped and not self._stays_whole(site):
                key = (site.kind, site.path)
                gone = self.ranked[key][widths[site.kind] :]
                lost += sum(self.scores[key][i] for i in gone)
        return lost

    def least(self) -> Structure:
        """Return the smallest structure."""
        dropped = frozenset(path for path, _ in self.to_go)
        heads, dimensions = min(self.heads_and_dimensions(), key=lambda pair: pair[::-1])
        widths: Widths = {"heads": heads, "neurons": self.neurons[0], "dimensions": dimensions}
        return self.structure(dropped, widths)

    def by_sparsity(self, target: Target) -> Structure:
        """Remove a fraction of the units of each kind, the same number in every layer.

        Of the numbers of heads and dimensions that may go together, the nearest.
        """
        wanted = {
            kind: max(size - round(target.sparsity.get(kind, 0.0) * size), 1)
            for kind, size in self.sizes.items()
        }

        def off(pair: tuple[int, int]) -> float:
            names: tuple[Kind, ...] = ("heads", "dimensions")
            return sum(
                abs(number - wanted[kind]) / self.sizes[kind]
                for kind, number in zip(names, pair, strict=True)
                if kind in target.sparsity and kind in wanted
            )

        # Of equal ones the largest.
        heads, dimensions = min(reversed(self.heads_and_dimensions()), key=off)
        widths: Widths = {
            "heads": heads,
            "neurons": wanted.get("neurons", 0),
            "dimensions": dimensions,
        }
        layers = sum(site.size for site in self.units if site.kind == "layers")
        number = round(target.sparsity.get("layers", 0.0) * layers)
        if number > len(self.to_go):
            raise UnreachableTargetError(
                f"target sparsity of layers {target.sparsity['layers']:g} cannot be reached: at "
                f"most {len(self.to_go)} of {layers} layers may go"
            )
        return self.structure(frozenset(path for path, _ in self.to_go[:number]), widths)
