"""Expected cost of a model whose units are present with given probabilities; differentiable."""

from __future__ import annotations

import bisect
from collections.abc import Mapping

import torch

from hfslim.anatomy.structure import Key, Kind
from hfslim.anatomy.units import Site, Units
from hfslim.pruning.latency.latency_table import Curve, LatencyTable
from hfslim.pruning.search.price import UNPRICED, Price
from hfslim.pruning.search.unit_costs import Costs
from hfslim.pruning.target import Target


class ExpectedCost:
    """The expected cost of a model, in each figure that a target limits.

    A unit inside a layer is present only if the layer is. The expected cost is the cost at the
    expected number of units, which is exact for multiply-accumulates, parameters and counts.

    Attributes:
        names: The limited figures: the resource, or the kinds of units of a sparsity.
    """

    def __init__(self, units: Units, target: Target, costs: Price = UNPRICED) -> None:
        self.units = units
        runs = [site.path for site in units if site.layers.runs]
        if runs:
            raise ValueError(
                f"l0 cannot weigh the runs of {runs[0]!r}, which share its heads and neurons: "
                "leave layers out of `units`, or choose another criterion"
            )
        coupled = [f"{site.kind} at {site.path!r}" for site in units if site.coupled]
        if coupled:
            raise ValueError(
                f"criterion l0: what the {coupled[0]} cost depends on other units, so their gates "
                "cannot be learned under a budget; use criterion='fisher'"
            )
        if isinstance(costs, LatencyTable):
            self._tables = {str(target.resource): costs}
        elif isinstance(costs, Costs):
            self._tables = {str(target.resource): _of_costs(units, costs)}
        else:
            self._tables = {kind: _of_counts(units, kind) for kind in target.sparsity}
        self.names = tuple(self._tables)

    def kept(self, present: Mapping[Key, torch.Tensor]) -> torch.Tensor:
        """Return the expected fraction that is kept of each figure, `[names]`."""
        layers = self._by_layer(present)
        fractions = []
        for table in self._tables.values():
            total = torch.tensor(table.outside, dtype=torch.float64)
            for path, cost in table.layer.items():
                total = total + layers.get(path, 1.0) * cost
            for site in self.units:
                if site.kind != "layers":
                    number = present[site.key].sum()
                    inside = interpolate(table.site[site.key], number)
                    total = total + layers.get(site.layer, 1.0) * inside
            fractions.append(total / table.total)
        return torch.stack(fractions)

    def limits(self, target: Target) -> torch.Tensor:
        """Return the fraction of each figure that a target keeps, `[names]`."""
        by_kind = {str(kind): 1 - fraction for kind, fraction in target.sparsity.items()}
        limits = [by_kind.get(name, target.kept) for name in self.names]
        return torch.tensor(limits, dtype=torch.float64)

    def scores(self, present: Mapping[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
        """Return the expected cost of each unit, `[units]` by site.

        Maximising their sum under a budget keeps the units that are most likely present. The cost
        of a layer includes that of its units.
        """
        layers, scores = self._by_layer(present), dict[Key, torch.Tensor]()
        first = next(iter(self._tables.values()))
        for site in self.units:
            key, table = site.key, self._tables.get(site.kind, first)
            if site.kind != "layers":
                scores[key] = layers.get(site.layer, 1.0) * _inside(table, site, present)
                continue
            cost = torch.tensor([table.layer[f"{site.path}.{i}"] for i in range(site.size)])
            cost = cost.to(torch.float64)
            for inner in self.units:
                path, _, index = inner.layer.rpartition(".")
                if inner.kind != "layers" and path == site.path:
                    cost[int(index)] += _inside(table, inner, present).sum()
            scores[key] = present[key] * cost
        return scores

    def _by_layer(self, present: Mapping[Key, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            f"{site.path}.{index}": probability
            for site in self.units
            if site.kind == "layers"
            for index, probability in enumerate(present["layers", site.path])
        }


def interpolate(curve: Curve, width: torch.Tensor) -> torch.Tensor:
    """Interpolate a curve linearly at a width, with the slope as gradient.

    Examples:
        >>> width = torch.tensor(3.0, requires_grad=True)
        >>> value = interpolate(Curve((0, 2, 6), (0.0, 1.0, 5.0)), width)
        >>> value.backward()
        >>> value.item(), width.grad.item()
        (2.0, 1.0)
    """
    widths, values = curve.widths, curve.ms
    right = min(max(bisect.bisect_right(widths, width.item()), 1), len(widths) - 1)
    left = right - 1
    slope = (values[right] - values[left]) / (widths[right] - widths[left])
    return values[left] + slope * (width - widths[left])


def _inside(table: LatencyTable, site: Site, present: Mapping[Key, torch.Tensor]) -> torch.Tensor:
    """Return the expected cost of a site's units if their layer is present, `[units]`."""
    key = site.key
    return present[key] * (table.site[key].ms[-1] / site.size)


def _of_costs(units: Units, costs: Costs) -> LatencyTable:
    """Return costs as a table: of each layer without its units, and of each site by its width."""
    site: dict[Key, Curve] = {}
    layer = {
        f"{s.path}.{i}": float(cost)
        for s in units
        if s.kind == "layers"
        for i, cost in enumerate(costs.layer["layers", s.path])
    }
    for s in units:
        if s.kind != "layers":
            whole = float(s.size * costs.unit[s.key])
            site[s.key] = Curve((0, s.size), (0.0, whole))
            if s.layer in layer:
                layer[s.layer] -= whole
    return LatencyTable(float(costs.total), layer, site)


def _of_counts(units: Units, kind: Kind) -> LatencyTable:
    """Return a table in which each unit of one kind costs 1, and others nothing."""
    counts = {s.key: s.size * (s.kind == kind) for s in units}
    layers = [site for site in units if site.kind == "layers"]
    return LatencyTable(
        float(sum(counts.values())),
        {f"{s.path}.{i}": float(kind == "layers") for s in layers for i in range(s.size)},
        {
            s.key: Curve((0, s.size), (0.0, float(counts[s.key])))
            for s in units
            if s.kind != "layers"
        },
    )
