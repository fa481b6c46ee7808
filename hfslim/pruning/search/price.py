"""The price of a structure: counted, measured, or none where a target counts units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from hfslim.anatomy.structure import Structure
from hfslim.anatomy.units import Units
from hfslim.pruning.target import Resource


class Price(Protocol):
    """The cost of a model, and of what is left of it after a cut."""

    @property
    def resource(self) -> Resource | Literal["sparsity"]:
        """The resource that is priced."""

    @property
    def total(self) -> float:
        """The cost of the whole model."""

    @property
    def step(self) -> int:
        """The number of features whose multiples are to be kept."""

    def of(self, units: Units, structure: Structure) -> float:
        """Return the cost of the model once it is cut to a structure of these sites."""


@dataclass(frozen=True)
class Unpriced:
    """The price under a sparsity, which counts units whatever they cost."""

    resource: Literal["sparsity"] = "sparsity"
    total: float = 0.0
    step: int = 1

    def of(self, units: Units, structure: Structure) -> float:
        """Return 0."""
        return 0.0


UNPRICED = Unpriced()


def dropped_layers(units: Units, structure: Structure) -> set[str]:
    """Return the paths of the layers that a structure removes."""
    return {
        f"{site.path}.{i}"
        for site in units
        if site.kind == "layers"
        for i in set(range(site.size)) - set(structure.kept("layers", site.path))
    }
