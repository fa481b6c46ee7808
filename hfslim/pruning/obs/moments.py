"""Second moments at the layers that take units: for elimination and reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from hfslim.anatomy.structure import Key
from hfslim.anatomy.units import Site, Units
from hfslim.pruning.gates.gates import Gates
from hfslim.pruning.obs.backward_pass import run_backward
from hfslim.pruning.obs.matrix_layers import MatrixLayer, matrix_layers
from hfslim.pruning.obs.memory_budget import in_passes, statistics_budget
from hfslim.pruning.scores.batches import run_within_memory
from hfslim.pruning.scores.importance import EMPTY, UnusableScoresError
from hfslim.training.ranks import add_over_ranks

T = TypeVar("T")

UNFOLDED = 4
"""Number of examples whose inputs of a convolution are unfolded at once."""
RIDGE = 1e-2
"""Ridge on the diagonal of second moments, as a fraction of the diagonal's mean."""


@dataclass
class InputMoments:
    """Sums over positions of a layer's inputs, which add up over batches and ranks.

    Attributes:
        weight: Sum of the weights of the positions, `[]`.
        first: `Σ weight · x`, `[inputs]`.
        second: `Σ weight · x xᵀ`, `[inputs, inputs]`.
    """

    weight: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor

    @classmethod
    def zeros(cls, device: torch.device, *shapes: tuple[int, ...]) -> Self:
        """Return empty sums, of the shapes of the attributes."""
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    def add_inputs(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Add positions: inputs `[positions, inputs]`, weights `[positions]`."""
        # Padding, and in the last layer all positions but the classified ones, have weight 0.
        used = weight.nonzero().flatten()
        x, weight = x[used].float(), weight[used]
        weighted = x * weight.unsqueeze(-1)
        self.weight += weight.sum(dtype=torch.float64)
        self.first += weighted.sum(0, dtype=torch.float64)
        self.second += weighted.T @ x

    def reduce(self) -> None:
        """Add the sums of all ranks."""
        for total in vars(self).values():
            add_over_ranks(total)

    def covariance(self, centred: bool, ridge: float = RIDGE) -> torch.Tensor:
        """Return mean second moments with a ridge, `[inputs, inputs]`; about the mean if centred.

        Centre them for a layer with a bias, which compensates the mean of removed inputs.
        """
        second = self.second / self.weight.clamp_min(1e-300)
        # The rounding error of float32 sums, which is all that is left where all inputs are equal.
        rounding = (
            torch.finfo(torch.float32).eps * second.trace() if ridge else second.new_zeros(())
        )
        if centred:
            second -= torch.outer(self.mean, self.mean)
        added = torch.maximum(ridge * second.diagonal().mean(), rounding).clamp_min(1e-30)
        # In place, because these are the largest matrices.
        second = (second + second.T).div_(2)
        second.diagonal().add_(added)
        return second

    @property
    def mean(self) -> torch.Tensor:
        """Mean input, `[inputs]`."""
        return self.first / self.weight.clamp_min(1e-300)


@dataclass
class Moments(InputMoments):
    """Sums over positions at a layer `y = W x + b`.

    A position has the weight `‖g‖²`, where `g` is the gradient of `decision_factors` at `y`.
    Padding gets no gradient, and so the weight 0.

    Attributes:
        outer: `Σ g gᵀ`, `[outputs, outputs]`.
        examples: Number of examples, `[]`.
    """

    outer: torch.Tensor
    examples: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Moments:
        """Return empty sums for a layer with a weight `[outputs, inputs]`."""
        outputs, inputs = weight.shape
        shapes = ((), (inputs,), (inputs, inputs), (outputs, outputs), ())
        return cls.zeros(weight.device, *shapes)

    @staticmethod
    def size(weight: torch.Tensor) -> int:
        """Return the bytes of the two matrices of sums."""
        return 8 * sum(side * side for side in weight.shape)

    def add(self, x: torch.Tensor, g: torch.Tensor) -> None:
        """Add positions: inputs `[positions, inputs]`, gradients `[positions, outputs]`."""
        g = g.float()
        self.add_inputs(x, g.square().sum(-1))
        self.outer += g.T @ g


class SecondMoments:
    """The second moments at a model's `matrix_layers`, within the memory budget.

    If all fit into the budget, they are gathered in one pass over the data and kept. Otherwise each
    group of sites takes its own pass, and its moments are discarded after use.
    """

    def __init__(
        self, units: Units, batches: Iterable[Mapping[str, Any]], progress: bool = True
    ) -> None:
        self.units = units
        self._batches = batches
        self._progress = progress
        self._kept: dict[Key, list[Moments]] | None = None

    def kept(self, model: PreTrainedModel) -> Mapping[Key, list[Moments]] | None:
        """Return the moments of all sites, gathered at the first call; None if above the budget."""
        if self._kept is None:
            sizes = {site: _size(model, site) for site in self.units}
            if sum(sizes.values()) <= statistics_budget(model):
                self._kept = gather(model, self.units, self._batches, self._progress)
        return self._kept

    def each(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        use: Callable[[Site, list[Moments]], T],
        purpose: str,
    ) -> dict[Key, T]:
        """Return the results of a function of the moments of each site, by site."""
        kept = self.kept(model) if sites else {}
        if kept is not None:
            return {s.key: use(s, kept[s.key]) for s in sites}
        sizes = {site: _size(model, site) for site in sites}
        results = {}
        for title, group in in_passes(sizes, model, purpose):
            found = gather(model, self.units, self._batches, self._progress, group, title)
            for site in group:
                key = site.key
                results[key] = use(site, found.pop(key))
        return results


def gather(
    model: PreTrainedModel,
    units: Units,
    batches: Iterable[Mapping[str, Any]],
    progress: bool = True,
    sites: Sequence[Site] | None = None,
    title: str = "second moments",
) -> dict[Key, list[Moments]]:
    """Sum second moments at the layers that take units, in one pass over the examples of all ranks.

    No labels are needed, and the model is not changed. The moments are returned by site, of all
    `units` or of some `sites` among them, for each of a site's matrix layers.
    """
    # All sites are gated and hooked, so that the result of one does not depend on the choice.
    gates, wanted = Gates(model, units), list(units) if sites is None else sites
    layers_of = {site: matrix_layers(model, site) for site in units}

    def check() -> None:
        gates.check_fired()
        gates.fired.clear()

    def once(batches: Iterable[Mapping[str, Any]]) -> tuple[dict[Key, list[Moments]], int]:
        by_path = {one.path: (one, Moments.of(one.weight)) for s in wanted for one in layers_of[s]}
        found = {s.key: [by_path[one.path][1] for one in layers_of[s]] for s in wanted}

        def on_gradient(path: str, x: torch.Tensor, g: torch.Tensor) -> None:
            if path in by_path:
                layer, moments = by_path[path]
                for inputs, gradients in zip(_parts(x, layer), _parts(g, layer), strict=True):
                    moments.add(*layer.positions(inputs, gradients))

        with gates:
            modules = {one.path: one.module for layers in layers_of.values() for one in layers}
            return found, run_backward(model, modules, batches, on_gradient, progress, check, title)

    found, examples = run_within_memory(once, batches)
    for (kind, path), several in found.items():
        for moments in several:
            moments.examples += examples
            moments.reduce()
            if not moments.examples:
                raise UnusableScoresError(EMPTY)
            if not torch.isfinite(moments.outer).all() or not torch.isfinite(moments.second).all():
                subject = f"inputs or gradients at the {kind} of {path!r} are"
                raise UnusableScoresError.not_finite(subject)
    return found


def _parts(x: torch.Tensor, layer: MatrixLayer) -> tuple[torch.Tensor, ...]:
    """Split a batch so that the unfolded patches of a convolution stay small."""
    return x.split(UNFOLDED) if layer.is_convolution else (x,)


def _size(model: nn.Module, site: Site) -> int:
    return sum(Moments.size(one.weight) for one in matrix_layers(model, site))
