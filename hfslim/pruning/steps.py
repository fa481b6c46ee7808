"""The steps of pruning: calibration, the decision, the cut."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.model_state import check_classifier, check_state
from hfslim.anatomy.structure import Key, Kind, Structure
from hfslim.anatomy.units import Units
from hfslim.hub.format.blueprint import check_built
from hfslim.pruning.latency.latency_search import LatencyTry, check_measured, search_measured
from hfslim.pruning.latency.latency_table import LatencyTable
from hfslim.pruning.obs.matrix_layers import matrix_layers
from hfslim.pruning.obs.moments import SecondMoments
from hfslim.pruning.obs.reconstruction import (
    Reconstruction,
    check_reconstruction,
    layer_scores,
    obs_scores,
    reconstructed,
)
from hfslim.pruning.scores.batches import Batches
from hfslim.pruning.scores.collect import collect
from hfslim.pruning.scores.collector import same_total
from hfslim.pruning.scores.criteria import CRITERIA
from hfslim.pruning.search.search import Search
from hfslim.pruning.surgery.batch_norms import renew_batch_norms
from hfslim.pruning.surgery.proof import probe_logits
from hfslim.pruning.surgery.surgery import shrink
from hfslim.training.ranks import from_all_ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """The statistics of a model on calibration data: enough to cut it, or copies, to any target.

    Attributes:
        units: The sites that may lose units.
        scores: Importance of every unit by site, `[units]`.
        batches: The data.
        moments: Second moments of the inputs of the layers that take heads, neurons and channels;
            None where neither scores nor reconstruction need them.
        reconstruction: How the remaining weights compensate for the removed units.
    """

    units: Units
    scores: Mapping[Key, torch.Tensor]
    batches: Batches
    moments: SecondMoments | None = None
    reconstruction: Reconstruction = "none"


def check_prunable(model: PreTrainedModel) -> None:
    """Check before any work that a model is a classifier that can be scored, cut, saved and loaded.

    Raises:
        TypeError: The model is no module, or a wrapper around one.
        ValueError: Its weights are not plain parameters, its logits are not a classifier's, or its
            class does not build its tensors.
    """
    check_state(model)
    check_classifier(model)
    probe_logits(model)
    check_built(model)


def calibrate(
    model: PreTrainedModel,
    units: Units,
    batches: Batches,
    criteria: Mapping[Kind, str],
    seed: int = 0,
    progress: bool = True,
    reconstruction: Reconstruction = "weights",
) -> Calibration:
    """Score the units of a model: the slow part of pruning, done once for any number of targets.

    Raises:
        ValueError: The data is empty or does not fit, scores are not finite, or `reconstruction` is
            unknown.
    """
    check_reconstruction(reconstruction)
    eliminated = [kind for kind, name in criteria.items() if CRITERIA[name].eliminates]
    around = find_units(model) if "layers" in eliminated else units
    moments: SecondMoments | None = None
    scores: dict[Key, torch.Tensor] = {}
    if eliminated or reconstruction != "none":
        projected, others = _projected(model, around, eliminated)
        moments = SecondMoments(projected, batches, progress) if len(projected) else None
        if eliminated:
            scores = _eliminated(model, around, moments, others, batches, seed, progress)
            if "layers" in eliminated:
                scores |= layer_scores(around, scores)
            scores = {key: value for key, value in scores.items() if key[0] in eliminated}
    rest = {kind: name for kind, name in criteria.items() if kind not in eliminated}
    if rest:
        scores |= collect(model, units.of(rest), batches, rest, seed, progress)
    if eliminated and rest:
        scores = same_total(scores)
    return Calibration(units, scores, batches, moments, reconstruction)


def _projected(
    model: PreTrainedModel, units: Units, eliminated: Sequence[Kind]
) -> tuple[Units, Units]:
    """Return the sites whose units are inputs of a weight matrix, and sites of other channels.

    Raises:
        ValueError: Heads or neurons to be scored are no such inputs, or nothing can be scored.
    """
    sites, others, without = [], [], []
    for site in units:
        if site.kind not in ("heads", "neurons", "channels"):
            continue
        try:
            matrix_layers(model, site)
            sites.append(site)
        except ValueError as error:
            scored = site.kind in eliminated or "layers" in eliminated
            if scored and site.kind != "channels":
                raise ValueError(f"criterion obs: {error}; use criterion='fisher'") from error
            without.append(f"{site.kind} at {site.path!r}")
            others += [site] if scored else []
    if without:
        more = f" and {len(without) - 1} more" if len(without) > 1 else ""
        logger.warning(
            "no weight matrix of their own takes the %s%s: not reconstructed%s",
            *(without[0], more),
            ", and scored by fisher, brought to the scale of obs" if others else "",
        )
    if eliminated and not sites and not others:
        raise ValueError(
            "criterion obs: the model has no heads, neurons and channels to score its layers by; "
            "use criterion='fisher'"
        )
    return Units(tuple(sites)), Units(tuple(others))


def _eliminated(
    model: PreTrainedModel,
    units: Units,
    moments: SecondMoments | None,
    others: Units,
    batches: Batches,
    seed: int,
    progress: bool,
) -> dict[Key, torch.Tensor]:
    """Score by elimination, and channels without a weight matrix by their Fisher information.

    Both estimate the loss. The ratio of the two sums over all channels with a matrix is the scale.
    """
    scores = {} if moments is None else obs_scores(model, moments)
    if len(others):
        known = [s for s in units if s.kind == "channels" and ("channels", s.path) in scores]
        both = Units((*others, *known))
        fisher = collect(model, both, batches, {"channels": "fisher"}, seed, progress)
        sums = [sum(float(by["channels", s.path].sum()) for s in known) for by in (scores, fisher)]
        scale = sums[0] / sums[1] if known and sums[1] else 1.0
        scores |= {("channels", s.path): scale * fisher["channels", s.path] for s in others}
    return scores


def check_reachable(search: Search) -> None:
    """Check that a target can be met, before any work is done.

    Raises:
        UnreachableTargetError: It cannot; the message gives the nearest that can.
    """
    alike = {s.key: torch.ones(s.size, dtype=torch.float64) for s in search.units}
    if search.target.resource == "latency" and not isinstance(search.price, LatencyTable):
        check_measured(search, alike)
    else:
        search.structure(alike)


def decide(
    search: Search, scores: Mapping[Key, torch.Tensor]
) -> tuple[Structure, tuple[LatencyTry, ...]]:
    """Choose the units to keep for a target; the same on every rank.

    Returns:
        The structure, and under a latency what was timed until it was met.

    Raises:
        UnreachableTargetError: The target cannot be met; the message gives the nearest that can.
    """
    tries: list[LatencyTry] = []
    if search.target.resource == "latency":
        structure, tries = search_measured(search, scores)
    else:
        structure = search.structure(scores)
    logger.info("keeps %s for %s", structure, search.target)
    return agreed(structure), tuple(tries)


def agreed(structure: Structure) -> Structure:
    """Return a structure that all ranks chose.

    Raises:
        RuntimeError: They chose several; raised on every rank.
    """
    digests = from_all_ranks(structure.digest())
    if len(set(digests)) > 1:
        chosen = ", ".join(f"rank {rank} {digest}" for rank, digest in enumerate(digests))
        raise RuntimeError(
            f"the ranks chose different structures ({chosen}), so their weights or scores have "
            "diverged: load the same model and checkpoint on every process, and train the wrapped "
            "model"
        )
    return structure


def cut(model: PreTrainedModel, structure: Structure, calibration: Calibration) -> None:
    """Remove the units that a structure lacks from the calibrated model, or from a copy of it.

    Where channels or layers are removed, batch norms get new statistics from the calibration data.

    Raises:
        RuntimeError: The cut model would not equal the gated one. The model is unchanged.
    """
    structure = calibration.units.complete(structure)
    how = calibration.reconstruction
    with reconstructed(model, calibration.units, structure, calibration.moments, how):
        shrink(model, structure)
    if any(e.kind in ("channels", "layers") and len(e.kept) < e.total for e in structure):
        renew_batch_norms(model, calibration.batches)


def cut_copy(
    model: PreTrainedModel, structure: Structure, calibration: Calibration
) -> PreTrainedModel:
    """Return a copy of the model that was cut to a structure."""
    small = copy.deepcopy(model)
    cut(small, structure, calibration)
    return small
