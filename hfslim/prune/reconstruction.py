"""Change the weights that stay, so that they make up for the units that go."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from hfslim.anatomy import Site, Units
from hfslim.prune.gates import Key
from hfslim.prune.moments import Moments, SecondMoments, projection
from hfslim.prune.obs import eliminate, refit, rescale
from hfslim.structure import Structure

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


def obs_scores(
    model: PreTrainedModel, units: Units, moments: SecondMoments
) -> dict[Key, torch.Tensor]:
    """Score units by what each adds to the loss when it goes in its turn and the others make up.

    Units of a site go one by one, so the scores of one site rise in the order in which they go, and
    the sum of those removed estimates the loss. A layer scores the sum of what is in it.

    Args:
        model: The model whose moments these are.
        units: Its sites.
        moments: Of its heads and neurons.

    Returns:
        `[units]` by site, float64.
    """

    def rising(site: Site, one: Moments) -> torch.Tensor:
        order, costs = _eliminated(model, site, one)
        # Strictly rising, so that sorting by score gives back the order.
        step = 1e-12 * costs.sum() * torch.arange(1, site.size + 1).to(costs)
        scores = torch.empty_like(costs)
        scores[order] = costs.clamp_min(0).cummax(0).values + step
        return scores.cpu()

    scores = moments.each(model, moments.units.sites, rising, "scores")
    for site in units:
        if site.runs:
            raise ValueError(
                f"obs scores layers by what is in them, and those at {site.path!r} are runs of the "
                "same module: choose another criterion for layers, such as fisher"
            )
        if site.kind == "layers":
            inside = [[s for s in units if s.layer == f"{site.path}.{i}"] for i in range(site.size)]
            keys = [[(s.kind, s.path) for s in sites] for sites in inside]
            sums = [sum(scores[key].sum() for key in some if key in scores) for some in keys]
            scores[site.kind, site.path] = torch.tensor(sums, dtype=torch.float64)
    return scores


def _eliminated(
    model: PreTrainedModel, site: Site, moments: Moments
) -> tuple[list[int], torch.Tensor]:
    weight = projection(model, site).double()
    return eliminate(
        moments.covariance(_bias(model, site) is not None),
        weight.T @ (moments.outer / moments.examples) @ weight,
        site.width,
    )


@dataclass
class _Mended:
    """What stays of a projection, and its bias.

    Attributes:
        site: The site behind which it is.
        inputs: Numbers of the inputs that stay, `[kept]`.
        weight: `[outputs, kept]`.
        bias: `[outputs]`; None if it has none.
    """

    site: Site
    inputs: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def now(self, model: PreTrainedModel) -> _Mended:
        """Return the same of what a model has now."""
        weight = projection(model, self.site).index_select(1, self.inputs)
        bias = _bias(model, self.site)
        return _Mended(self.site, self.inputs, weight, None if bias is None else bias.clone())

    def put(self, model: PreTrainedModel) -> None:
        """Put it into a model."""
        projection(model, self.site)[:, self.inputs] = self.weight
        bias = _bias(model, self.site)
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

    The projection behind each site is solved for by least squares, and its bias makes up for the
    mean. The weights that meet removed units, whose inputs are gone, stay as they are, and so do
    sites without moments.

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

        def solve(site: Site, one: Moments) -> _Mended:
            return _mended(model, site, kept[site.kind, site.path], one, how)

        mended = [*moments.each(model, cut, solve, "reconstruction").values()]
    before: list[_Mended] = []
    try:
        while mended:
            before.append(mended[-1].now(model))
            mended.pop().put(model)
        yield
    except BaseException:
        for old in before:
            old.put(model)
        raise


def _mended(
    model: PreTrainedModel, site: Site, kept: tuple[int, ...], moments: Moments, how: Reconstruction
) -> _Mended:
    """Solve for the projection behind a site."""
    weight, bias = projection(model, site), _bias(model, site)
    old, second = weight.double(), moments.covariance(bias is not None)
    units = torch.tensor(kept, dtype=torch.long, device=old.device)
    inputs = (units[:, None] * site.width + torch.arange(site.width).to(units)).flatten()
    if how == "weights":
        new = refit(old, second, inputs)
    else:
        scales = rescale(old, second, units, site.width)
        if scales.abs().max() > LARGEST_SCALE:
            logger.warning(
                "%s: a factor of %.1f would be needed, so its weights stay as they are",
                site.gate,
                scales.abs().max(),
            )
            scales = torch.ones_like(scales)
        new = torch.zeros_like(old)
        new[:, inputs] = old[:, inputs] * scales.repeat_interleave(site.width)
    if bias is not None:
        bias = bias + ((old - new) @ moments.mean).to(bias)
    return _Mended(site, inputs, new[:, inputs].to(weight), bias)


def _bias(model: PreTrainedModel, site: Site) -> torch.Tensor | None:
    """Return the bias of the projection behind a site, if it has one."""
    bias = getattr(model.get_submodule(site.gate), "bias", None)
    return None if bias is None else bias.detach()
