"""Change the weights that stay, so that they make up for the units that go."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from hfslim.anatomy import Site, Units
from hfslim.prune.gates import Key
from hfslim.prune.moments import Moments, projection
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
    model: PreTrainedModel, units: Units, moments: Mapping[Key, Moments]
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
    scores = {}
    for (kind, path), one in moments.items():
        site = units.site(kind, path)
        weight = projection(model, site).double()
        metric = weight.T @ (one.outer / one.examples) @ weight
        order, costs = eliminate(one.covariance(_has_bias(model, site)), metric, site.width)
        # Strictly rising, so that sorting by score gives back the order.
        step = 1e-12 * costs.sum() * torch.arange(1, site.size + 1).to(costs)
        rising = torch.empty_like(costs)
        rising[order] = costs.clamp_min(0).cummax(0).values + step
        scores[kind, path] = rising.cpu()
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


@contextmanager
def reconstructed(
    model: PreTrainedModel,
    units: Units,
    structure: Structure,
    moments: Mapping[Key, Moments],
    how: Reconstruction,
) -> Iterator[None]:
    """Let what stays make up for what a structure removes; taken back if the block fails.

    The projection behind each site is solved for by least squares, and its bias makes up for the
    mean; the weights that meet removed units become 0. Sites without moments stay as they are.

    Args:
        model: The model whose moments these are.
        units: Its sites.
        structure: The units to keep.
        moments: Second moments by site.
        how: `weights`: every weight that stays; `scales`: one factor for each unit that stays,
            which multiplies its weights; `none`: nothing.

    Yields:
        Nothing.
    """
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        if how != "none":
            for site in units:
                one = moments.get((site.kind, site.path))
                kept = structure.kept(site.kind, site.path)
                if one is not None and len(kept) < site.size:
                    _reconstruct(model, site, kept, one, how, before)
        yield
    except BaseException:
        for parameter, old in before:
            parameter.copy_(old)
        raise


def _reconstruct(
    model: PreTrainedModel,
    site: Site,
    kept: tuple[int, ...],
    moments: Moments,
    how: Reconstruction,
    before: list[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    module = model.get_submodule(site.gate)
    view = projection(model, site)
    old = view.double()
    second = moments.covariance(_has_bias(model, site))
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
    before.append((view, view.clone()))
    view.copy_(new)
    if _has_bias(model, site):
        bias = module.get_parameter("bias").detach()
        before.append((bias, bias.clone()))
        bias += ((old - new) @ moments.mean).to(bias)


def _has_bias(model: PreTrainedModel, site: Site) -> bool:
    return getattr(model.get_submodule(site.gate), "bias", None) is not None
