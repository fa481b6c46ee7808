"""Cut a model as far as a drop of a metric allows, by few evaluations."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Unpack

from transformers import PreTrainedModel

from hfslim.anatomy.structure import Structure
from hfslim.measuring.timing import evaluating
from hfslim.pruning.oneshot import PruneOptions, PruneResult, calibrated_search
from hfslim.pruning.search.search import Search
from hfslim.pruning.steps import Calibration, cut, cut_copy, decide
from hfslim.pruning.target import Resource, Target, UnreachableTargetError, is_number
from hfslim.training.ranks import from_first_rank

logger = logging.getLogger(__name__)

Evaluate = Callable[[PreTrainedModel], float]
"""Function that returns a metric of a model; higher is better."""

EVALUATIONS = 6
"""Halvings of the interval: the answer is at most 1/64 of the whole too large."""


@dataclass(frozen=True)
class MetricTry:
    """A cut that was evaluated.

    Attributes:
        kept: Fraction of the resource that was asked for.
        metric: The cut model's metric.
        drop: The whole model's metric less the cut model's.
        within: Whether the drop is allowed.
    """

    kept: float
    metric: float
    drop: float
    within: bool


def prune_within(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    max_metric_drop: float,
    evaluate: Evaluate,
    resource: Resource = "macs",
    **options: Unpack[PruneOptions],
) -> PruneResult:
    """Cut a trained classifier as far as a metric allows, without training.

    The fraction of the resource to keep is bisected by six evaluations of cut copies, on the
    assumption that the metric falls as less is kept. If all lose too much, the model stays whole,
    with a warning.

    Args:
        model: The classifier; not a wrapper around it.
        data: Batches of model inputs, as for `prune`.
        max_metric_drop: The largest allowed drop of the metric, absolute. Hold data out from
            `evaluate` to check the promise on.
        evaluate: Returns a metric of a model, higher is better.
        resource: `macs`, `parameters` or `latency`.
        **options: `units`, `criterion`, `inputs` and the further arguments of `prune`.

    Returns:
        The structure of the smallest model found within the drop, the model, the scores and what
        was evaluated.

    Raises:
        ValueError: An argument is wrong or conflicts with another, the data is empty, or scores or
            the metric are not finite. The model is unchanged.
        RuntimeError: The cut model would not equal the gated one. The model is unchanged.
    """
    if not is_number(max_metric_drop) or not 0 <= max_metric_drop < math.inf:
        raise ValueError(f"max_metric_drop must be 0 or more, got {max_metric_drop!r}")
    search, calibration = calibrated_search(model, data, Target.of(resource, 1.0), **options)
    structure, tries = _smallest(search, calibration, max_metric_drop, evaluate)
    if structure is None:
        logger.warning(
            "every cut that was tried loses more than %g, so the model stays whole", max_metric_drop
        )
        structure = search.units.full()
    cut(model, structure, calibration)
    return PruneResult(structure, model, calibration.scores, tuple(tries))


def _smallest(
    search: Search, calibration: Calibration, max_drop: float, evaluate: Evaluate
) -> tuple[Structure | None, list[MetricTry]]:
    """Return the smallest structure found within the drop, and what was tried."""
    baseline = metric_of(search.model, evaluate)
    logger.info("the whole model's metric is %.4f, %.4f is allowed", baseline, baseline - max_drop)
    best, tries = None, []
    low, high = 0.0, 1.0
    for number in range(1, EVALUATIONS + 1):
        kept = (low + high) / 2
        target = Target(search.target.resource, kept)
        try:
            structure, _ = decide(replace(search, target=target), calibration.scores)
        except UnreachableTargetError as error:
            logger.info("try %d of %d: %s", number, EVALUATIONS, error)
            low = kept
            continue
        metric = metric_of(cut_copy(search.model, structure, calibration), evaluate)
        done = MetricTry(kept, metric, baseline - metric, baseline - metric <= max_drop)
        tries.append(done)
        logger.info(
            "try %d of %d: keeps %.3f, metric %.4f, drop %+.4f, %s: %s",
            *(number, EVALUATIONS, kept, metric, done.drop),
            *("within" if done.within else "too much", structure),
        )
        if done.within:
            best, high = structure, kept
        else:
            low = kept
    return best, tries


def metric_of(model: PreTrainedModel, evaluate: Evaluate) -> float:
    """Return a model's metric, in eval mode without gradients; that of the first rank on all.

    Raises:
        ValueError: The metric is no finite number.
    """
    with evaluating(model):
        metric = evaluate(model)
    try:
        value = float(metric)
    except (TypeError, ValueError):
        raise ValueError(
            f"evaluate must return a number, higher is better; it returned {metric!r}"
        ) from None
    if not math.isfinite(value):
        raise ValueError(f"evaluate must return a finite number, it returned {value}")
    return from_first_rank(lambda: value)
