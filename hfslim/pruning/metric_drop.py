"""Find the smallest model that stays within a drop of a metric, by few evaluations."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from hfslim.anatomy.structure import Structure
from hfslim.measuring.timing import evaluating
from hfslim.pruning.target import UnreachableTargetError
from hfslim.training.ranks import from_first_rank

logger = logging.getLogger(__name__)

Evaluate = Callable[[PreTrainedModel], float]
"""Returns a metric of a model; higher is better."""

EVALUATIONS = 6
"""Halvings of the interval: the answer is at most 1/64 of the whole too large."""


@dataclass(frozen=True)
class MetricTry:
    """A cut that was evaluated.

    Attributes:
        kept: Fraction of the resource that was asked for.
        metric: The cut model's metric.
        drop: The whole model's metric less that.
        within: Whether that is no more than allowed.
    """

    kept: float
    metric: float
    drop: float
    within: bool


def smallest_within(
    model: PreTrainedModel,
    max_drop: float,
    evaluate: Evaluate,
    decide: Callable[[float], Structure],
    cut_copy: Callable[[Structure], PreTrainedModel],
) -> tuple[Structure | None, list[MetricTry]]:
    """Bisect the fraction to keep, taking the metric to fall as less is kept.

    Args:
        model: The whole model.
        max_drop: How much lower the metric may be than the whole model's.
        evaluate: The metric.
        decide: Returns the structure that keeps a fraction of the resource.
        cut_copy: Returns a copy of the model, cut to a structure.

    Returns:
        The structure of the smallest fraction found that stays within the drop, None if all tried
        lost more; and what was tried. The model is not changed.

    Raises:
        ValueError: The metric is no finite number.
    """
    baseline = metric_of(model, evaluate)
    logger.info("the whole model's metric is %.4f, %.4f is allowed", baseline, baseline - max_drop)
    best, tries = None, []
    low, high = 0.0, 1.0
    for number in range(1, EVALUATIONS + 1):
        kept = (low + high) / 2
        try:
            structure = decide(kept)
        except UnreachableTargetError as error:
            logger.info("try %d of %d: %s", number, EVALUATIONS, error)
            low = kept
            continue
        metric = metric_of(cut_copy(structure), evaluate)
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
    """Evaluate a model, in eval mode without gradients; the first rank's figure on all.

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
        raise ValueError(f"evaluate returned {value}, which is no metric to go by")
    return from_first_rank(lambda: value)
