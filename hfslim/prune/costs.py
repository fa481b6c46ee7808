"""What each unit costs, so that a structure's cost is known before anything is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from hfslim.anatomy import Site, Units
from hfslim.measure import count_parameters, macs_by_module
from hfslim.prune.gates import Key
from hfslim.structure import Structure

Resource = Literal["macs", "parameters"]


@dataclass(frozen=True)
class Costs:
    """The cost of a model, split by what could be removed.

    Attributes:
        resource: What is counted.
        total: Cost of the whole model.
        unit: Cost of one unit at each site of heads or neurons.
        layer: Cost of each layer of each list, everything inside it included.
    """

    resource: Resource
    total: int
    unit: Mapping[Key, int]
    layer: Mapping[Key, tuple[int, ...]]

    def of(self, units: Units, structure: Structure) -> int:
        """Return the cost of the model once it is cut to a structure."""
        left = self.total
        dropped = set()
        for site in units:
            if site.kind == "layers":
                layers = set(range(site.size)) - set(structure.kept("layers", site.path))
                left -= sum(self.layer["layers", site.path][i] for i in layers)
                dropped |= {f"{site.path}.{i}" for i in layers}
        for site in units:
            if site.kind != "layers" and site.layer not in dropped:
                gone = site.size - len(structure.kept(site.kind, site.path))
                left -= gone * self.unit[site.kind, site.path]
        return left


def count(
    model: nn.Module, units: Units, resource: Resource, inputs: Mapping[str, torch.Tensor]
) -> Costs:
    """Count what each unit of a model costs at a stated input.

    Multiply-accumulates of a head are those of its slices of the projections and its share of the
    two products of attention; `4·s·d·d_h + 2·s²·d_h` for one sequence of length `s`.

    Args:
        model: The model.
        units: The sites to price.
        resource: `macs` or `parameters`.
        inputs: The input at which multiply-accumulates are counted.

    Returns:
        The costs.
    """
    if resource == "parameters":
        return Costs(
            resource,
            count_parameters(model),
            {(s.kind, s.path): _unit_parameters(model, s) for s in units if s.cuts},
            {
                (s.kind, s.path): tuple(count_parameters(layer) for layer in _layers(model, s))
                for s in units
                if s.kind == "layers"
            },
        )
    macs = macs_by_module(model, inputs)
    return Costs(
        resource,
        macs[""],
        {(s.kind, s.path): _unit_macs(model, s, macs) for s in units if s.cuts},
        {
            (s.kind, s.path): tuple(macs.get(f"{s.path}.{i}", 0) for i in range(s.size))
            for s in units
            if s.kind == "layers"
        },
    )


def _layers(model: nn.Module, site: Site) -> list[nn.Module]:
    return list(model.get_submodule(site.path).children())


def _unit_parameters(model: nn.Module, site: Site) -> int:
    tensors = ((getattr(model.get_submodule(cut.module), cut.tensor), cut) for cut in site.cuts)
    return sum(
        tensor.numel() // tensor.shape[cut.dim] * sum(cut.widths)
        for tensor, cut in tensors
        if isinstance(tensor, nn.Parameter)
    )


def _unit_macs(model: nn.Module, site: Site, macs: Mapping[str, int]) -> int:
    # Part of a projection may belong to no unit: the one key and value that all heads share.
    shares = {
        cut.module: sum(cut.widths)
        / model.get_submodule(cut.module).get_parameter(cut.tensor).shape[cut.dim]
        for cut in reversed(site.cuts)
        if cut.tensor == "weight"
    }
    total = sum(macs.get(path, 0) * share for path, share in shares.items())
    if site.kind == "heads":
        # What remains of the module are the products of attention, and, where the module does not
        # run its projections as modules, these too.
        inside = (macs.get(p, 0) for p in shares if p.startswith(f"{site.path}."))
        total += (macs[site.path] - sum(inside)) / site.size
    return int(total)
