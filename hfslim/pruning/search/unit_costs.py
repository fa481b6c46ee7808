"""Count the cost of each unit, so that the cost of a structure is known before the cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace

import torch
from torch import nn

from hfslim.anatomy import families, mixtures
from hfslim.anatomy.structure import Key, Structure
from hfslim.anatomy.units import Site, Units
from hfslim.measuring.measurement import count_parameters, macs_by_module
from hfslim.pruning.search.price import dropped_layers
from hfslim.pruning.target import Resource


@dataclass(frozen=True)
class Product:
    """The cost of one tensor: the product of its dimensions, several of which hold units.

    Attributes:
        module: Path of its module.
        cost: Cost of the whole tensor.
        dims: Length of each dimension with units, and the entries per unit of each site in it.
        used: Entries of each dimension that are used at most: the experts that a token goes to.
    """

    module: str
    cost: int
    dims: tuple[tuple[int, tuple[tuple[Key, int], ...]], ...]
    used: tuple[int, ...]

    def at(self, gone: Mapping[Key, int]) -> int:
        """Return the cost without a number of units of each site."""
        left = [
            min(length - sum(gone.get(key, 0) * width for key, width in sites), used)
            for (length, sites), used in zip(self.dims, self.used, strict=True)
        ]
        return self.cost * math.prod(left) // math.prod(self.used)

    @property
    def sites(self) -> set[Key]:
        """The sites that it depends on."""
        return {key for _, sites in self.dims for key, _ in sites}


@dataclass(frozen=True)
class Costs:
    """The counted price of a model, by the parts that may be removed.

    Attributes:
        resource: `macs` or `parameters`.
        total: Cost of the whole model.
        unit: Cost of one unit of each site whose cost does not depend on other sites.
        layer: Cost of each layer of each list, everything inside it included.
        products: The tensors with units whose costs depend on each other: channels and experts, and
            all units where dimensions may be removed.
        step: The number of features whose multiples are to be kept.
    """

    resource: Resource
    total: int
    unit: Mapping[Key, int]
    layer: Mapping[Key, tuple[int, ...]]
    products: tuple[Product, ...] = ()
    step: int = 1

    def step_of(self, site: Site) -> int:
        """Return the number of units of a site whose multiples are to be kept."""
        if site.kind in ("heads", "experts"):
            return 1
        return self.step // math.gcd(self.step, site.width)

    def left_in(self, dropped: Set[str]) -> list[Product]:
        """Return the products outside of dropped layers."""
        gone = tuple(f"{path}." for path in dropped)
        return [one for one in self.products if not one.module.startswith(gone)]

    def without(self, units: Units, dropped: Set[str]) -> Costs:
        """Return the costs without some layers: units that run fewer times cost less."""
        left = {
            site.path: 1 - sum(f"{site.path}.{i}" in dropped for i in range(site.size)) / site.size
            for site in units
            if site.layers.runs and self.resource == "macs"
        }
        if not left:
            return self
        share = {site.key: left.get(site.layer, 1.0) for site in units}
        return replace(self, unit={key: int(n * share[key]) for key, n in self.unit.items()})

    def of(self, units: Units, structure: Structure) -> int:
        """Return the cost of the model once it is cut to a structure."""
        left, dropped = self.total, dropped_layers(units, structure)
        for site in units:
            if site.kind == "layers":
                costs = self.layer["layers", site.path]
                left -= sum(c for i, c in enumerate(costs) if f"{site.path}.{i}" in dropped)
        gone: dict[Key, int] = {
            site.key: site.size - len(structure.kept(site.kind, site.path))
            for site in units
            if site.kind != "layers" and site.layer not in dropped
        }
        unit = self.without(units, dropped).unit
        for key, number in gone.items():
            left -= number * unit.get(key, 0)
        return left - sum(one.cost - one.at(gone) for one in self.left_in(dropped))


def count(
    model: nn.Module, units: Units, resource: Resource, inputs: Mapping[str, torch.Tensor]
) -> Costs:
    """Count the cost of each unit of a model at a stated input.

    The multiply-accumulates of a head are those of its slices of the projections and its share of
    the two products of attention: `4·s·d·d_h + 2·s²·d_h` for one sequence of length `s`.
    """
    if resource == "parameters":
        return Costs(
            resource,
            count_parameters(model),
            {s.key: _unit_parameters(model, s) for s in _narrow(units)},
            {
                s.key: tuple(
                    sum(count_parameters(model.get_submodule(path)) for path in s.parts(i))
                    for i in range(s.size)
                )
                for s in units
                if s.kind == "layers"
            },
            tuple(_products(model, units, None)),
        )
    macs = macs_by_module(model, inputs)
    return Costs(
        resource,
        macs[""],
        {s.key: _unit_macs(model, s, macs) for s in _narrow(units)},
        {
            s.key: tuple(_layer_macs(model, s, i, macs) for i in range(s.size))
            for s in units
            if s.kind == "layers"
        },
        tuple(_products(model, units, macs)),
    )


def _narrow(units: Units) -> list[Site]:
    return [site for site in units if site.kind != "layers" and site not in _coupled(units)]


def _coupled(units: Units) -> set[Site]:
    """Return the sites whose units share costs with others: all, if some are dimensions."""
    everywhere = any(site.kind == "dimensions" for site in units)
    return {site for site in units if site.kind != "layers" and (everywhere or site.coupled)}


def _products(model: nn.Module, units: Units, macs: Mapping[str, int] | None) -> Iterator[Product]:
    """Yield the cost of each tensor with coupled units: its multiply-accumulates, or entries.

    A token costs as much as the experts that it goes to, whatever their total number.
    """
    coupled = _coupled(units)
    dims: dict[tuple[str, str], dict[int, dict[Key, int]]] = {}
    chosen: dict[tuple[str, int], int] = {}
    for site in units:
        for cut in site.cuts if site in coupled else ():
            by_site = dims.setdefault((cut.module, cut.tensor), {}).setdefault(cut.dim, {})
            key = site.key
            by_site[key] = by_site.get(key, 0) + sum(cut.widths)
        if macs is not None and site.kind == "experts":
            chosen[site.gate, 0] = site.experts.chosen
    for (path, name), by_dim in dims.items():
        tensor = getattr(model.get_submodule(path), name)
        if macs is None:
            cost = tensor.numel() if isinstance(tensor, nn.Parameter) else 0
        else:
            # A weight norm makes the weight of its module.
            owner = path.removesuffix(".parametrizations.weight")
            names = ("weight", "original1", mixtures.EXPERTS_OUTPUT)
            cost = macs.get(owner, 0) if name in names else 0
        if cost:
            every = ((tensor.shape[dim], tuple(sites.items())) for dim, sites in by_dim.items())
            used = (
                min(chosen.get((path, dim), n), n) for dim in by_dim if (n := tensor.shape[dim])
            )
            yield Product(path, cost, tuple(every), tuple(used))
    for site in units if macs is not None else ():
        between = _between_heads(model, site, macs or {}) if site.kind == "heads" else 0
        if between and site in coupled:
            heads = (site.size, ((site.key, 1),))
            yield Product(site.path, between, (heads,), (site.size,))


def _layer_macs(model: nn.Module, site: Site, index: int, macs: Mapping[str, int]) -> int:
    if site.layers.runs:
        return macs.get(f"{site.path}.0", 0) // site.size
    paths = site.parts(index)
    if site.layers.ends:
        paths = tuple(f"{p}.{name}" for p in paths for name in model.get_submodule(p)._modules)
    return sum(macs.get(path, 0) for path in paths)


def _unit_parameters(model: nn.Module, site: Site) -> int:
    found = ((getattr(model.get_submodule(cut.module), cut.tensor), cut) for cut in site.cuts)
    # Weights that several modules share are there once.
    tensors = {(id(tensor), cut.dim): (tensor, cut) for tensor, cut in found}.values()
    return sum(
        tensor.numel() // tensor.shape[cut.dim] * sum(cut.widths)
        for tensor, cut in tensors
        if isinstance(tensor, nn.Parameter)
    )


def _unit_macs(model: nn.Module, site: Site, macs: Mapping[str, int]) -> int:
    # The one key and value that all heads share belong to no unit.
    shares = {
        cut.module: sum(cut.widths)
        / model.get_submodule(cut.module).get_parameter(cut.tensor).shape[cut.dim]
        for cut in reversed(site.cuts)
        if cut.tensor == "weight"
    }
    total = sum(macs.get(path, 0) * share for path, share in shares.items())
    if site.kind == "heads":
        total += _between_heads(model, site, macs) / site.size
    return int(total)


def _between_heads(model: nn.Module, site: Site, macs: Mapping[str, int]) -> int:
    """Return the cost of the products of attention: that of the module less its projections.

    Where it does not run its projections as modules, their cost is included.
    """
    modules = (site.path, *site.twins)
    # What has weights is no product, whether it has heads or not, as what makes latents has none.
    inside = [
        f"{path}.{name}"
        for path in modules
        for name, part in model.get_submodule(path).named_children()
        if name not in families.RUN_BY_HEAD
        if site.heads.norms or next(part.parameters(), None) is not None
    ]
    return sum(macs[path] for path in modules) - sum(macs.get(path, 0) for path in inside)
