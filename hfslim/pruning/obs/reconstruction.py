"""Scores by elimination, and reconstruction of the remaining weights by least squares."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from hfslim.anatomy.structure import Key, Structure
from hfslim.anatomy.units import Site, Units
from hfslim.pruning.obs.elimination import Elimination, eliminate, refit, rescale
from hfslim.pruning.obs.matrix_layers import MatrixLayer, matrix_layers
from hfslim.pruning.obs.moments import Moments, SecondMoments

logger = logging.getLogger(__name__)

Reconstruction = Literal["weights", "scales", "none"]
RECONSTRUCTIONS: tuple[Reconstruction, ...] = get_args(Reconstruction)

LARGEST_SCALE = 10.0
"""Solutions with a larger factor are discarded, as by Kwon et al."""


def check_reconstruction(how: str) -> None:
    """Raise a ValueError if there is no such reconstruction."""
    if how not in RECONSTRUCTIONS:
        raise ValueError(f"reconstruction must be one of {list(RECONSTRUCTIONS)}, got {how!r}")


def obs_scores(model: PreTrainedModel, moments: SecondMoments) -> dict[Key, torch.Tensor]:
    """Score units by the rise of the loss at their removal in turn, with updates of the others.

    The scores of a site, `[units]`, float64, rise in the order of removal, and the sum over removed
    units estimates the rise of the loss.
    """

    def rising(site: Site, around: list[Moments]) -> torch.Tensor:
        order, costs = _eliminated(model, site, around)
        # Strictly rising, so that sorting by score gives the order of removal.
        step = 1e-12 * costs.sum() * torch.arange(1, site.size + 1).to(costs)
        scores = torch.empty_like(costs)
        scores[order] = costs.clamp_min(0).cummax(0).values + step
        return scores.cpu()

    return moments.each(model, moments.units.sites, rising, "scores")


def layer_scores(units: Units, scores: Mapping[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
    """Score each layer by the sum of the scores of its units, `[layers]` by list, float64."""
    found: dict[Key, torch.Tensor] = {}
    for site in units:
        if site.layers.runs:
            raise ValueError(
                f"obs scores layers by their units, and those at {site.path!r} are runs of the "
                "same module: choose another criterion for layers, such as fisher"
            )
        if site.kind == "layers":
            inside = [[s for s in units if s.layer == f"{site.path}.{i}"] for i in range(site.size)]
            by_layer = [
                [scores[key].sum() for s in sites if (key := s.key) in scores] for sites in inside
            ]
            empty = [index for index in site.removable if not by_layer[index]]
            if empty:
                raise ValueError(
                    f"obs scores layers by their units, and layers {empty} at {site.path!r} have "
                    "no scored units: choose another criterion for layers, such as fisher"
                )
            sums = [sum(some) for some in by_layer]
            found[site.key] = torch.tensor(sums, dtype=torch.float64)
    return found


def _eliminated(
    model: PreTrainedModel, site: Site, around: list[Moments]
) -> tuple[list[int], torch.Tensor]:
    problems = []
    for layer, moments in zip(matrix_layers(model, site), around, strict=True):
        weight = layer.weight.double()
        metric = weight.T @ (moments.outer / moments.examples) @ weight
        second = moments.covariance(layer.bias is not None)
        problems.append(Elimination(second, metric, layer.width))
    return eliminate(problems)


@dataclass
class _Reconstruction:
    """The weights of a layer's remaining inputs, `[outputs, kept]`, and its bias, `[outputs]`."""

    layer: MatrixLayer
    inputs: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def current(self) -> _Reconstruction:
        """Return the same weights and bias as they are in the model now."""
        weight, bias = self.layer.weight.index_select(1, self.inputs), self.layer.bias
        return _Reconstruction(
            self.layer, self.inputs, weight, None if bias is None else bias.clone()
        )

    def put(self) -> None:
        """Write weights and bias into the model."""
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
    """Reconstruct the weights of remaining units; undo it if the block fails.

    Every layer that takes units of a site is solved by least squares, for all its remaining weights
    (`weights`) or for one factor per remaining unit (`scales`), and its bias compensates the mean.
    The weights of removed units do not change, nor do sites without moments.
    """
    new: list[_Reconstruction] = []
    if moments is not None and how != "none":
        known = {site.key for site in moments.units}
        kept = {s.key: structure.kept(s.kind, s.path) for s in units}
        cut = [s for s in units if (k := s.key) in known and len(kept[k]) < s.size]

        def solve(site: Site, around: list[Moments]) -> list[_Reconstruction]:
            layers = zip(matrix_layers(model, site), around, strict=True)
            units = torch.tensor(kept[site.key], dtype=torch.long)
            return [_solved(layer, units, one, how) for layer, one in layers]

        by_site = moments.each(model, cut, solve, "reconstruction")
        new = [one for several in by_site.values() for one in several]
    before: list[_Reconstruction] = []
    try:
        while new:
            before.append(new[-1].current())
            new.pop().put()
        yield
    except BaseException:
        for old in before:
            old.put()
        raise


def _solved(
    layer: MatrixLayer, units: torch.Tensor, moments: Moments, how: Reconstruction
) -> _Reconstruction:
    """Solve for the weights and bias of a layer that keeps some units."""
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
                "%s: a factor of %.1f would be needed, so its weights do not change",
                layer.path,
                scales.abs().max(),
            )
            scales = torch.ones_like(scales)
        new = torch.zeros_like(old)
        new[:, inputs] = old[:, inputs] * scales.repeat_interleave(layer.width)
    if bias is not None:
        bias = bias + ((old - new) @ moments.mean).to(bias)
    return _Reconstruction(layer, inputs, new[:, inputs].to(weight), bias)
