"""Change the weights that stay, so that they make up for the units that go."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from hfslim.anatomy.structure import Structure
from hfslim.anatomy.units import Site, Units
from hfslim.pruning.gates.gates import Key
from hfslim.pruning.obs.elimination import Elimination, eliminate, refit, rescale
from hfslim.pruning.obs.moments import Moments, SecondMoments
from hfslim.pruning.obs.projections import Projection, projections

logger = logging.getLogger(__name__)

Reconstruction = Literal["weights", "scales", "none"]
RECONSTRUCTIONS: tuple[Reconstruction, ...] = get_args(Reconstruction)

LARGEST_SCALE = 10.0
"""Solutions with a larger factor are dropped, as Kwon et al. do."""


def check_reconstruction(how: str) -> None:
    """Refuse a way that there is not.

    Raises:
        ValueError: Naming those that there are.
    """
    if how not in RECONSTRUCTIONS:
        raise ValueError(f"reconstruction must be one of {list(RECONSTRUCTIONS)}, got {how!r}")


def obs_scores(model: PreTrainedModel, moments: SecondMoments) -> dict[Key, torch.Tensor]:
    """Score units by what each adds to the loss when it goes in its turn and the others make up.

    Units of a site go one by one, so the scores of one site rise in the order in which they go, and
    the sum of those removed estimates the loss.

    Args:
        model: The model whose moments these are.
        moments: Of its heads, neurons and channels.

    Returns:
        `[units]` by site, float64.
    """

    def rising(site: Site, around: list[Moments]) -> torch.Tensor:
        order, costs = _eliminated(model, site, around)
        # Strictly rising, so that sorting by score gives back the order.
        step = 1e-12 * costs.sum() * torch.arange(1, site.size + 1).to(costs)
        scores = torch.empty_like(costs)
        scores[order] = costs.clamp_min(0).cummax(0).values + step
        return scores.cpu()

    return moments.each(model, moments.units.sites, rising, "scores")


def layer_scores(units: Units, scores: Mapping[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
    """Score each layer by the sum of what is in it.

    Args:
        units: The sites of the model.
        scores: Scores of the units in the layers, `[units]` by site.

    Returns:
        `[layers]` by list, float64.

    Raises:
        ValueError: Layers are runs of one module, or nothing in them has a score.
    """
    found: dict[Key, torch.Tensor] = {}
    for site in units:
        if site.layers.runs:
            raise ValueError(
                f"obs scores layers by what is in them, and those at {site.path!r} are runs of the "
                "same module: choose another criterion for layers, such as fisher"
            )
        if site.kind == "layers":
            inside = [[s for s in units if s.layer == f"{site.path}.{i}"] for i in range(site.size)]
            by_layer = [
                [scores[key].sum() for s in sites if (key := (s.kind, s.path)) in scores]
                for sites in inside
            ]
            empty = [index for index in site.removable if not by_layer[index]]
            if empty:
                raise ValueError(
                    f"obs scores layers by what is in them, and in those at {site.path!r} with the "
                    f"numbers {empty} nothing has a score: choose another criterion for layers, "
                    "such as fisher"
                )
            sums = [sum(some) for some in by_layer]
            found[site.kind, site.path] = torch.tensor(sums, dtype=torch.float64)
    return found


def _eliminated(
    model: PreTrainedModel, site: Site, around: list[Moments]
) -> tuple[list[int], torch.Tensor]:
    problems = []
    for layer, moments in zip(projections(model, site), around, strict=True):
        weight = layer.weight.double()
        metric = weight.T @ (moments.outer / moments.examples) @ weight
        second = moments.covariance(layer.bias is not None)
        problems.append(Elimination(second, metric, layer.width))
    return eliminate(problems)


@dataclass
class _Mended:
    """What stays of a projection, and its bias.

    Attributes:
        layer: The projection.
        inputs: Numbers of the inputs that stay, `[kept]`.
        weight: `[outputs, kept]`.
        bias: `[outputs]`; None if it has none.
    """

    layer: Projection
    inputs: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def now(self) -> _Mended:
        """Return the same as it is in the model now."""
        weight, bias = self.layer.weight.index_select(1, self.inputs), self.layer.bias
        return _Mended(self.layer, self.inputs, weight, None if bias is None else bias.clone())

    def put(self) -> None:
        """Put it into the model."""
        self.layer.put(self.layer.weight.index_copy(1, self.inputs, self.weight))
        bias = self.layer.bias
        if bias is not None and self.bias is not None:
            bias.copy_(self.bias)


@contextmanager
def reconstructed(
    model: PreTrainedModel,
    units: Units,
    structure: Structure,
    moments: SecondMoments | None,
    how: Reconstruction,
) -> Iterator[None]:
    """Let what stays make up for what a structure removes; taken back if the block fails.

    Every layer that takes units of a site is solved for by least squares, and its bias makes up for
    the mean. The weights that meet removed units, whose inputs are gone, stay as they are, and so
    do sites without moments.

    Args:
        model: The model whose moments these are.
        units: Its sites.
        structure: The units to keep.
        moments: Second moments; None if there are none.
        how: `weights`: every weight that stays; `scales`: one factor for each unit that stays,
            which multiplies its weights; `none`: nothing.

    Yields:
        Nothing.
    """
    mended: list[_Mended] = []
    if moments is not None and how != "none":
        known = {(site.kind, site.path) for site in moments.units}
        kept = {(s.kind, s.path): structure.kept(s.kind, s.path) for s in units}
        cut = [s for s in units if (k := (s.kind, s.path)) in known and len(kept[k]) < s.size]

        def solve(site: Site, around: list[Moments]) -> list[_Mended]:
            layers = zip(projections(model, site), around, strict=True)
            units = torch.tensor(kept[site.kind, site.path], dtype=torch.long)
            return [_mended(layer, units, one, how) for layer, one in layers]

        by_site = moments.each(model, cut, solve, "reconstruction")
        mended = [one for several in by_site.values() for one in several]
    before: list[_Mended] = []
    try:
        while mended:
            before.append(mended[-1].now())
            mended.pop().put()
        yield
    except BaseException:
        for old in before:
            old.put()
        raise


def _mended(
    layer: Projection, units: torch.Tensor, moments: Moments, how: Reconstruction
) -> _Mended:
    """Solve for a projection of which some units stay."""
    weight, bias = layer.weight, layer.bias
    old, second = weight.double(), moments.covariance(bias is not None)
    units = units.to(old.device)
    inputs = (units[:, None] * layer.width + torch.arange(layer.width).to(units)).flatten()
    if how == "weights":
        new = refit(old, second, inputs)
    else:
        scales = rescale(old, second, units, layer.width)
        if scales.abs().max() > LARGEST_SCALE:
            logger.warning(
                "%s: a factor of %.1f would be needed, so its weights stay as they are",
                layer.path,
                scales.abs().max(),
            )
            scales = torch.ones_like(scales)
        new = torch.zeros_like(old)
        new[:, inputs] = old[:, inputs] * scales.repeat_interleave(layer.width)
    if bias is not None:
        bias = bias + ((old - new) @ moments.mean).to(bias)
    return _Mended(layer, inputs, new[:, inputs].to(weight), bias)
