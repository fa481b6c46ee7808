"""The steps of pruning: what units cost, what data tells of them, the decision, the cut."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import Stated, stated_inputs
from hfslim.anatomy.structure import Kind, Structure
from hfslim.anatomy.units import Units
from hfslim.pruning.gates.gates import Key
from hfslim.pruning.latency.latency_measurement import latency_table, liked_multiple
from hfslim.pruning.latency.latency_search import LatencyTry, check_measured, search_measured
from hfslim.pruning.latency.latency_table import LatencyTable
from hfslim.pruning.obs.moments import SecondMoments
from hfslim.pruning.obs.projections import projections
from hfslim.pruning.obs.reconstruction import (
    Reconstruction,
    check_reconstruction,
    layer_scores,
    obs_scores,
    reconstructed,
)
from hfslim.pruning.scores.batches import Batches
from hfslim.pruning.scores.collect import collect, same_total
from hfslim.pruning.scores.criteria import CRITERIA
from hfslim.pruning.search import unit_costs as pricing
from hfslim.pruning.search.plain_config import Stream
from hfslim.pruning.search.search import search
from hfslim.pruning.search.uniform import search_uniform
from hfslim.pruning.surgery.batch_norms import renew_batch_norms
from hfslim.pruning.surgery.surgery import shrink
from hfslim.pruning.target import Target
from hfslim.training.ranks import from_all_ranks

logger = logging.getLogger(__name__)

Prices = pricing.Costs | LatencyTable | None
"""What units cost; None where a target counts units.

For a latency without a table it is multiply-accumulates, and the latency is met by timing.
"""


@dataclass(frozen=True)
class Calibration:
    """What calibration data told of a model: enough to cut it, or copies of it, to any target.

    Attributes:
        units: The sites that may lose units.
        scores: Importance of every unit by site, `[units]`.
        batches: The data.
        moments: Second moments of what goes into the layers that take heads, neurons and channels;
            None where neither scores nor reconstruction need them.
        reconstruction: How the weights that stay make up for what goes.
    """

    units: Units
    scores: Mapping[Key, torch.Tensor]
    batches: Batches
    moments: SecondMoments | None = None
    reconstruction: Reconstruction = "none"


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

    Args:
        model: The model, not a wrapper; it is not changed.
        units: The sites that may lose units.
        batches: The calibration data.
        criteria: The criterion of each kind of unit.
        seed: Seed of whatever is drawn.
        progress: Whether to show a progress bar.
        reconstruction: How the weights that stay are to make up for what goes.

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
    """Return the sites whose units meet weight matrices, and those of channels that do not.

    Raises:
        ValueError: Heads or neurons do not, and scores need them; or there is nothing to score.
    """
    sites, others, without = [], [], []
    for site in units:
        if site.kind not in ("heads", "neurons", "channels"):
            continue
        try:
            projections(model, site)
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
            *without[:1],
            more,
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
    """Score by elimination, and channels without a matrix by their Fisher information.

    Both estimate the loss; what all channels with a matrix score in sum by one and by the other
    tells the scale.
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


def decide(
    model: PreTrainedModel,
    calibration: Calibration,
    target: Target,
    costs: Prices,
    inputs: Stated | None = None,
    uniform: bool = False,
    stream: Stream | None = None,
) -> tuple[Structure, tuple[LatencyTry, ...]]:
    """Choose the units to keep for a target; the same on every rank.

    Args:
        model: The model that was calibrated; it is not changed.
        calibration: What is known of it.
        target: What it may cost.
        costs: What its units cost.
        inputs: The input at which they cost that.
        uniform: Whether all layers keep the same numbers of units.
        stream: How wide the residual stream may then be.

    Returns:
        The structure, and for a latency what was timed until it was met.

    Raises:
        UnreachableTargetError: The target cannot be met; the message says what can.
    """
    units, scores = calibration.units, calibration.scores
    find = functools.partial(search_uniform, stream=stream) if uniform else search
    tries: list[LatencyTry] = []
    if target.resource == "latency" and costs is not None:
        stated = stated_inputs(model, inputs)
        structure, tries = search_measured(
            model, units, target, costs, stated, lambda goal: find(units, scores, goal, costs)
        )
    else:
        structure = find(units, scores, target, costs)
    logger.info("keeps %s for %s", structure, target)
    return agreed(structure), tuple(tries)


def cut(model: PreTrainedModel, structure: Structure, calibration: Calibration) -> None:
    """Remove what a structure does not keep from the model that was calibrated, or a copy of it.

    Where channels or layers go, batch norms take their statistics anew from the calibration data.

    Raises:
        RuntimeError: The cut model would not equal the gated one. The model is unchanged.
    """
    structure = calibration.units.complete(structure)
    how = calibration.reconstruction
    with reconstructed(model, calibration.units, structure, calibration.moments, how):
        shrink(model, structure)
    if any(e.kind in ("channels", "layers") and len(e.kept) < e.total for e in structure):
        renew_batch_norms(model, calibration.batches)


def price(
    model: PreTrainedModel,
    units: Units,
    target: Target,
    inputs: Stated | None = None,
    progress: bool = True,
) -> Prices:
    """Tell what units cost in a target's resource; None where the target is a sparsity.

    Latencies are measured, where the cache does not have them. What one of the units that share
    their costs takes depends on all that it meets, so there is no table for these, and what they
    cost is their multiply-accumulates, in the numbers of units that the device likes.
    """
    if target.resource == "sparsity":
        return None
    stated = stated_inputs(model, inputs)
    if target.resource != "latency":
        return pricing.count(model, units, target.resource, stated)
    if any(site.coupled for site in units):
        return replace(pricing.count(model, units, "macs", stated), step=liked_multiple(model))
    return latency_table(model, units, stated, progress)


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


def check_reachable(
    model: PreTrainedModel,
    units: Units,
    target: Target,
    costs: Prices,
    inputs: Stated | None = None,
    uniform: bool = False,
    stream: Stream | None = None,
) -> None:
    """Check that a target can be met, before any work is done.

    Raises:
        UnreachableTargetError: It cannot; the message says what can.
    """
    alike = {(s.kind, s.path): torch.ones(s.size, dtype=torch.float64) for s in units}
    find = functools.partial(search_uniform, stream=stream) if uniform else search
    if target.resource == "latency" and isinstance(costs, pricing.Costs):
        stated = stated_inputs(model, inputs)
        check_measured(
            model, units, target, costs, stated, lambda goal: find(units, alike, goal, costs)
        )
    else:
        find(units, alike, target, costs)
