"""Scores of units from calibration data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import track
from transformers import PreTrainedModel

from hfslim.anatomy.structure import Key, Kind
from hfslim.anatomy.units import Units
from hfslim.measuring.timing import evaluating, placed
from hfslim.pruning.gates.gates import Gates
from hfslim.pruning.scores.batches import check_classes, class_of_each, run_within_memory
from hfslim.pruning.scores.collector import Collector
from hfslim.pruning.scores.criteria import check_labels
from hfslim.pruning.scores.finite import check_finite, check_gradients
from hfslim.training.objective import hard_loss, logits_of, problem_type

logger = logging.getLogger(__name__)


def collect(
    model: PreTrainedModel,
    units: Units,
    data: Iterable[Mapping[str, Any]],
    criteria: Mapping[Kind, str],
    seed: int = 0,
    progress: bool = True,
) -> dict[Key, torch.Tensor]:
    """Score units on calibration data; the model is not changed.

    `fisher` uses the loss by the labels. Without labels it is the Fisher information of the model's
    own predictions (Kunstner et al. 2019, arXiv 1905.12558), exact up to eight classes. Returns the
    mean scores by site, `[units]`, float64.

    Raises:
        ValueError: There are no examples, a batch or label does not fit, a criterion needs labels
            and there are none, or a score is not finite.
    """
    collector = Collector(Gates(model, units), criteria)
    if collector.needs_data:
        run(model, collector, data, progress)
    return collector.result(model, seed, data, progress)


def run(
    model: PreTrainedModel,
    collector: Collector,
    data: Iterable[Mapping[str, Any]],
    progress: bool = True,
) -> None:
    """Reset a collector and run calibration data through the model, which is not changed.

    Batches that do not fit into memory are halved.
    """

    def once(batches: Iterable[Mapping[str, Any]]) -> None:
        collector.reset()
        with collector.gates, evaluating(model), frozen(model):
            collector.start()
            for batch in track(batches, "scoring", disable=not progress, transient=True):
                _score(model, collector, batch)

    run_within_memory(once, data)
    logger.info("scored %s on %d examples", collector.names, collector.scores.count)


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Set `requires_grad` of all parameters to False inside the block."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _score(model: PreTrainedModel, collector: Collector, batch: Mapping[str, Any]) -> None:
    """Run a batch forward, and backward where a criterion needs the loss by the labels."""
    inputs = placed(model, batch)
    labels = inputs.pop("labels", inputs.pop("label", None))
    if labels is None:
        check_labels(collector.names)
    if collector.by_class:
        collector.labels = class_of_each(labels, collector.classes)
    collector.unlabelled = labels is None
    collector.problem = problem = problem_type(model.config, labels)
    collector.gates.fired.clear()
    with torch.set_grad_enabled(collector.needs_gradients):
        logits = logits_of(model(**inputs))
        collector.gates.check_fired()
        check_finite(model, inputs, logits)
        if labels is not None:
            check_classes(labels, logits.shape[-1], problem)
        if collector.needs_gradients:
            check_gradients(model, logits)
        if collector.needs_loss:
            hard_loss(logits, labels, problem).sum().backward()
