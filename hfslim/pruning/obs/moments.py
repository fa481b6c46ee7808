"""Second moments around the projections that units feed: what removing units and mending needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from hfslim.anatomy.units import Site, Units
from hfslim.pruning.gates.gates import Gates, Key
from hfslim.pruning.obs.backward_pass import listen
from hfslim.pruning.obs.memory_budget import in_passes, room_beside
from hfslim.pruning.obs.projections import Projection, projections
from hfslim.pruning.scores.batches import fitting
from hfslim.pruning.scores.importance import EMPTY, UnusableScoresError
from hfslim.training.ranks import add_over_ranks

T = TypeVar("T")

UNFOLDED = 4
"""Examples of which a convolution's inputs are unfolded at once."""
RIDGE = 1e-2
"""Added to the diagonal of second moments, as a fraction of its mean."""


@dataclass
class InputMoments:
    """Sums over positions of what goes into a projection, so that batches and ranks add theirs.

    Attributes:
        weight: Sum of what the positions count, `[]`.
        first: `Σ weight · x`, `[inputs]`.
        second: `Σ weight · x xᵀ`, `[inputs, inputs]`.
    """

    weight: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor

    @classmethod
    def nothing(cls, device: torch.device, *shapes: tuple[int, ...]) -> Self:
        """Return sums over nothing, of the shapes of the attributes."""
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    def add_inputs(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Add positions: inputs `[positions, inputs]`, what each counts `[positions]`."""
        # Padding, and in the last layer all positions but those that are classified, count nothing.
        there = weight.nonzero().flatten()
        x, weight = x[there].float(), weight[there]
        weighted = x * weight.unsqueeze(-1)
        self.weight += weight.sum(dtype=torch.float64)
        self.first += weighted.sum(0, dtype=torch.float64)
        self.second += weighted.T @ x

    def reduce(self) -> None:
        """Add up those of all ranks."""
        for total in vars(self).values():
            add_over_ranks(total)

    def covariance(self, centred: bool, ridge: float = RIDGE) -> torch.Tensor:
        """Return mean second moments with a ridge, `[inputs, inputs]`; about the mean if centred.

        Where a projection has a bias, the bias makes up for the mean of what is removed.
        """
        second = self.second / self.weight.clamp_min(1e-300)
        # Sums over float32 are known to this; where all inputs are alike, nothing else is left.
        rounding = (
            torch.finfo(torch.float32).eps * second.trace() if ridge else second.new_zeros(())
        )
        if centred:
            second -= torch.outer(self.mean, self.mean)
        added = torch.maximum(ridge * second.diagonal().mean(), rounding).clamp_min(1e-30)
        # In place, because these matrices are the largest that there are.
        second = (second + second.T).div_(2)
        second.diagonal().add_(added)
        return second

    @property
    def mean(self) -> torch.Tensor:
        """Mean input, `[inputs]`."""
        return self.first / self.weight.clamp_min(1e-300)


@dataclass
class Moments(InputMoments):
    """Sums over positions around a projection `y = W x + b`.

    A position counts by `‖g‖²`, where `g` is the gradient of `decision_roots` at `y`: by how much
    the decision listens there. Padding gets no gradient, so it counts nothing.

    Attributes:
        outer: `Σ g gᵀ`, `[outputs, outputs]`.
        examples: Number of examples, `[]`.
    """

    outer: torch.Tensor
    examples: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Moments:
        """Return the sums over nothing around a projection with a weight `[outputs, inputs]`."""
        outputs, inputs = weight.shape
        shapes = ((), (inputs,), (inputs, inputs), (outputs, outputs), ())
        return cls.nothing(weight.device, *shapes)

    @staticmethod
    def size(weight: torch.Tensor) -> int:
        """Return the bytes of the sums around a projection, but for what is no matrix."""
        return 8 * sum(side * side for side in weight.shape)

    def add(self, x: torch.Tensor, g: torch.Tensor) -> None:
        """Add positions: inputs `[positions, inputs]`, gradients `[positions, outputs]`."""
        g = g.float()
        self.add_inputs(x, g.square().sum(-1))
        self.outer += g.T @ g


class SecondMoments:
    """The second moments around a model's projections, as many at once as there is room for.

    Where there is room for all, data is gone through once, and they are kept. Where there is not,
    it is gone through anew for each group of sites, whose moments are used and forgotten.

    Args:
        units: Sites whose units meet weight matrices.
        batches: Model inputs; labels are passed over.
        progress: Whether to show progress bars.
    """

    def __init__(
        self, units: Units, batches: Iterable[Mapping[str, Any]], progress: bool = True
    ) -> None:
        self.units = units
        self._batches = batches
        self._progress = progress
        self._kept: dict[Key, list[Moments]] | None = None

    def kept(self, model: PreTrainedModel) -> Mapping[Key, list[Moments]] | None:
        """Return the moments of all sites, gathered when first asked for; None without room."""
        if self._kept is None:
            sizes = {site: _size(model, site) for site in self.units}
            if sum(sizes.values()) <= room_beside(model):
                self._kept = gather(model, self.units, self._batches, self._progress)
        return self._kept

    def each(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        use: Callable[[Site, list[Moments]], T],
        purpose: str,
    ) -> dict[Key, T]:
        """Use the moments of some sites, one by one.

        Args:
            model: The model, or a copy of it; it is not changed, nor may `use` change it.
            sites: The sites, some of `units`.
            use: Called with each of them and the moments around its projections.
            purpose: What for, for the log.

        Returns:
            What `use` returned, by site.
        """
        kept = self.kept(model) if sites else {}
        if kept is not None:
            return {(s.kind, s.path): use(s, kept[s.kind, s.path]) for s in sites}
        sizes = {site: _size(model, site) for site in sites}
        results = {}
        for title, group in in_passes(sizes, model, purpose):
            found = gather(model, self.units, self._batches, self._progress, group, title)
            for site in group:
                key = site.kind, site.path
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
    """Sum second moments around the projections that units feed, in one pass over data.

    No labels are needed, and the model is not changed.

    Args:
        model: The model, not a wrapper.
        units: Sites whose units meet weight matrices.
        batches: Model inputs; labels are passed over.
        progress: Whether to show a progress bar.
        sites: Those of the units whose moments are wanted; all if not given.
        title: What the progress bar says.

    Returns:
        The sums over the examples of all ranks, of each projection of a site.

    Raises:
        UnusableScoresError: There are no examples, or an activation or gradient is not finite; the
            message names the module.
    """
    # All are gated and listened at, so that not a bit depends on which are wanted.
    gates, wanted = Gates(model, units), list(units) if sites is None else sites
    at = {site: projections(model, site) for site in units}

    def check() -> None:
        gates.check_fired()
        gates.fired.clear()

    def once(
        batches: Iterable[Mapping[str, Any]],
    ) -> tuple[dict[Key, list[Moments]], int]:
        by_path = {one.path: (one, Moments.of(one.weight)) for s in wanted for one in at[s]}
        found = {(s.kind, s.path): [by_path[one.path][1] for one in at[s]] for s in wanted}

        def heard(path: str, x: torch.Tensor, g: torch.Tensor) -> None:
            if path in by_path:
                layer, moments = by_path[path]
                for some, theirs in zip(_parts(x, layer), _parts(g, layer), strict=True):
                    moments.add(*layer.positions(some, theirs))

        with gates:
            modules = {one.path: one.module for layers in at.values() for one in layers}
            return found, listen(model, modules, batches, heard, progress, check, title)

    found, examples = fitting(once, batches)
    for (kind, path), several in found.items():
        for moments in several:
            moments.examples += examples
            moments.reduce()
            if not moments.examples:
                raise UnusableScoresError(EMPTY)
            if not torch.isfinite(moments.outer).all() or not torch.isfinite(moments.second).all():
                raise UnusableScoresError(
                    f"inputs or gradients at the {kind} of {path!r} are not finite: check the "
                    "model's weights and the calibration data for NaN and overflow"
                )
    return found


def _parts(x: torch.Tensor, layer: Projection) -> tuple[torch.Tensor, ...]:
    """Part what a layer gets so that what a convolution sees of it is never large."""
    return x.split(UNFOLDED) if layer.convolves else (x,)


def _size(model: nn.Module, site: Site) -> int:
    return sum(Moments.size(one.weight) for one in projections(model, site))
