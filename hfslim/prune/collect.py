"""Gather the importance of every unit while a model runs: on calibration data, or in training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from rich.progress import track
from transformers import PreTrainedModel

from hfslim.anatomy import Site, Units
from hfslim.objective import IGNORED_LABEL, ProblemType, hard_loss, problem_type
from hfslim.prune import importance
from hfslim.prune.gates import Gates, Key
from hfslim.prune.importance import CRITERIA, Criterion, Scores
from hfslim.structure import KINDS, Kind
from hfslim.timing import evaluating, placed

logger = logging.getLogger(__name__)

Criteria = Criterion | Mapping[Kind, Criterion]


def criteria_by_kind(criterion: Criteria, kinds: Iterable[Kind]) -> dict[Kind, Criterion]:
    """Spell out a criterion for each kind of unit.

    Raises:
        ValueError: A kind or a criterion is unknown, is not for that kind, or a kind has none.
    """
    given = dict(criterion) if isinstance(criterion, Mapping) else None
    result: dict[Kind, Criterion] = {}
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"unknown kind of unit {kind!r}: expected some of {list(KINDS)}")
        name = criterion if given is None else given.get(kind)
        if name not in CRITERIA:
            raise ValueError(
                f"criterion for {kind}: got {name!r}, expected one of {list(CRITERIA)}"
            )
        if name == "block_influence" and kind != "layers":
            raise ValueError(f"block_influence scores layers, not {kind}")
        result[kind] = name
    return result


class Collector:
    """Adds up scores from what a model's gates report.

    Args:
        gates: The gates, attached or not.
        criteria: The criterion of each kind of unit.
        mean_loss: Whether the loss that is back-propagated is a mean over the batch, not a sum.
    """

    def __init__(
        self, gates: Gates, criteria: Mapping[Kind, Criterion], mean_loss: bool = False
    ) -> None:
        self.gates = gates
        self.criteria = dict(criteria)
        self.mean_loss = mean_loss
        self.reset()
        self._counted = next((s for s in gates.units if self._from_data(s.kind)), None)

    def reset(self) -> None:
        """Forget all examples."""
        sites = (site for site in self.gates.units if self._from_data(site.kind))
        self.scores = Scores(
            {(s.kind, s.path): torch.zeros(s.size, dtype=torch.float64) for s in sites}
        )

    @property
    def needs_gradients(self) -> bool:
        """Whether a backward pass is needed."""
        return any(c in importance.FROM_GRADIENTS for c in self.criteria.values())

    @property
    def needs_data(self) -> bool:
        """Whether the model has to run at all."""
        return any(self._from_data(kind) for kind in self.criteria)

    def start(self) -> None:
        """Listen to the gates from now on."""
        self.gates.on_gradient = self._on_gradient if self.needs_gradients else None
        listens = any(c in importance.FROM_ACTIVATIONS for c in self.criteria.values())
        self.gates.on_activation = self._on_activation if listens else None

    def stop(self) -> None:
        """Listen no more."""
        self.gates.on_gradient = self.gates.on_activation = None

    def result(self, model: torch.nn.Module, seed: int) -> dict[Key, torch.Tensor]:
        """Return the mean scores over all examples of all ranks, `[units]` by site.

        Raises:
            ValueError: There were no examples, or a score is not finite.
        """
        scores: dict[Key, torch.Tensor] = {}
        units = self.gates.units
        if self.needs_data:
            scores = self.scores.reduce().mean()
        used = set(self.criteria.values())
        if "random" in used:
            scores |= self._of_kind("random", importance.random_scores(units, seed))
        if "magnitude" in used:
            scores |= self._of_kind("magnitude", importance.magnitude(model, units))
        taylor = self._of_kind("taylor", scores)
        scores |= importance.normalise({k: v for k, v in taylor.items() if k[0] != "layers"})
        if len(used) > 1:
            scores = _same_total(scores)
        Scores(scores, 1).mean()
        return scores

    def _on_gradient(self, site: Site, index: int, gradient: torch.Tensor) -> None:
        criterion = self.criteria[site.kind]
        if criterion in importance.FROM_GRADIENTS:
            gradient = gradient * len(gradient) if self.mean_loss else gradient
            score = importance.fisher if criterion == "fisher" else importance.taylor
            self._add(site, index, score(gradient), len(gradient))

    def _on_activation(
        self, site: Site, index: int, before: torch.Tensor, after: torch.Tensor
    ) -> None:
        criterion = self.criteria[site.kind]
        if criterion not in importance.FROM_ACTIVATIONS:
            return
        examples = self.gates.examples
        before, after = (x.reshape(examples, -1, x.shape[-1]) for x in (before, after))
        weight = self.gates.padding
        if weight is None or weight.shape != after.shape[:2]:
            weight = torch.ones(after.shape[:2], device=after.device)
        if criterion == "block_influence":
            value = importance.block_influence(before, after, weight)
        else:
            value = after - before if site.kind == "layers" else after
            units = 1 if site.kind == "layers" else site.size
            value = importance.activation(value * weight.unsqueeze(-1), units)
        self._add(site, index, value, examples)

    def _add(self, site: Site, index: int, value: torch.Tensor, examples: int) -> None:
        self.scores.add(site, index, value)
        if site == self._counted and not index:
            self.scores.count += examples

    def _of_kind(
        self, criterion: Criterion, scores: Mapping[Key, torch.Tensor]
    ) -> dict[Key, torch.Tensor]:
        return {key: v for key, v in scores.items() if self.criteria[key[0]] == criterion}

    def _from_data(self, kind: Kind) -> bool:
        known = (*importance.FROM_GRADIENTS, *importance.FROM_ACTIVATIONS)
        return self.criteria[kind] in known


def collect(
    model: PreTrainedModel,
    units: Units,
    data: Iterable[Mapping[str, Any]],
    criteria: Mapping[Kind, Criterion],
    seed: int = 0,
    progress: bool = True,
) -> dict[Key, torch.Tensor]:
    """Score units on calibration data; the model is not changed.

    Gradients are those of the loss by the labels. Where the data has none, labels are drawn from
    the model's own predictions, which makes `fisher` the Fisher information itself (Kunstner et
    al. 2019, arXiv 1905.12558).

    Args:
        model: The model, not a wrapper.
        units: The sites to score.
        data: Batches of model inputs, with or without `labels`.
        criteria: The criterion of each kind of unit.
        seed: Seed of drawn labels and of random scores.
        progress: Whether to show a progress bar.

    Returns:
        Mean scores by site, `[units]`, float64.

    Raises:
        ValueError: There are no examples, a batch or label does not fit, or a score is not finite.
    """
    gates = Gates(model, units)
    collector = Collector(gates, criteria)
    if not collector.needs_data:
        return collector.result(model, seed)
    generator = torch.Generator().manual_seed(seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    first = True
    with gates, evaluating(model):
        collector.start()
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            shown = track(data, "scoring", disable=not progress, transient=True)
            for batch in shown:
                inputs = placed(model, batch)
                labels = inputs.pop("labels", inputs.pop("label", None))
                with torch.set_grad_enabled(collector.needs_gradients):
                    logits = model(**inputs).logits
                    if first:
                        gates.check_fired()
                        first = False
                    if collector.needs_gradients:
                        problem = problem_type(model.config, labels)
                        if labels is None:
                            labels = _drawn_labels(logits, problem, generator)
                        _check_labels(labels, logits.shape[-1], problem)
                        hard_loss(logits, labels, problem).sum().backward()
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
    scores = collector.result(model, seed)
    logger.info("scored %s on %d examples", dict(criteria), collector.scores.count)
    return scores


def _check_labels(labels: torch.Tensor, classes: int, problem: ProblemType) -> None:
    """Refuse classes that the model does not have; on a GPU they would end the process."""
    if problem == "single_label_classification" and len(labels):
        lowest, highest = labels.min().item(), labels.max().item()
        if highest >= classes or (lowest < 0 and lowest != IGNORED_LABEL):
            raise ValueError(
                f"labels go from {lowest} to {highest}, the model has classes 0 to {classes - 1}"
            )


def _drawn_labels(
    logits: torch.Tensor, problem: ProblemType, generator: torch.Generator
) -> torch.Tensor:
    """Draw labels from a model's own predictions."""
    chances = logits.detach().float().cpu()
    if problem == "regression":
        drawn = torch.normal(chances, torch.ones_like(chances), generator=generator)
    elif problem == "multi_label_classification":
        drawn = torch.bernoulli(chances.sigmoid(), generator=generator)
    else:
        drawn = torch.multinomial(chances.softmax(-1), 1, generator=generator).squeeze(-1)
    return drawn.to(logits.device)


def _same_total(scores: dict[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
    """Scale scores of different criteria so that those of each kind add up to 1."""
    totals: dict[Kind, float] = {}
    for (kind, _), value in scores.items():
        totals[kind] = totals.get(kind, 0.0) + value.sum().item()
    logger.info("criteria differ between kinds: the scores of each kind are scaled to a sum of 1")
    return {key: value / max(totals[key[0]], 1e-30) for key, value in scores.items()}
