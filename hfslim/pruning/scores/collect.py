"""Gather the importance of every unit while a model runs: on calibration data, or in training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import track
from transformers import PreTrainedModel

from hfslim.anatomy.structure import Kind
from hfslim.anatomy.units import Site, Units
from hfslim.measuring.timing import evaluating, placed
from hfslim.pruning.gates.gates import Gates, Key
from hfslim.pruning.scores import importance
from hfslim.pruning.scores.batches import check_classes, class_of_each, fitting
from hfslim.pruning.scores.criteria import CRITERIA, Criterion, Rows, Seen, check_labels
from hfslim.pruning.scores.finite import check_finite, check_gradients
from hfslim.pruning.scores.importance import Scores
from hfslim.training.batch_shares import share_of
from hfslim.training.objective import ProblemType, hard_loss, logits_of, problem_type

logger = logging.getLogger(__name__)


class Collector:
    """Adds up scores from what a model's gates report.

    Args:
        gates: The gates, attached or not.
        criteria: The name of the criterion of each kind of unit.
        mean_loss: Whether the loss that is back-propagated is a mean over the batch, not a sum.
        classes: Number of classes whose sums are kept apart as well; 0 for none.

    Attributes:
        scores: The sums so far, of this rank.
        by_class: The same sums over the examples of each class alone.
        labels: The class of each example of the current batch, where classes are kept apart.
        unlabelled: Whether the current batch has no labels, so that predictions stand in.
        problem: What the model's logits mean; by its config if None.
    """

    def __init__(
        self,
        gates: Gates,
        criteria: Mapping[Kind, str],
        mean_loss: bool = False,
        classes: int = 0,
    ) -> None:
        self.gates = gates
        self.names = dict(criteria)
        self.criteria = {kind: CRITERIA[name] for kind, name in criteria.items()}
        self.mean_loss = mean_loss
        self.classes = classes
        self.labels = torch.empty(0, dtype=torch.long)
        self.unlabelled = False
        self.problem: ProblemType | None = None
        self._temperature: float | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all examples."""
        self.scores = self._nothing()
        self.by_class = [self._nothing() for _ in range(self.classes)]

    def _nothing(self) -> Scores:
        return Scores(
            {
                (site.kind, site.path): torch.zeros(site.size, dtype=torch.float64)
                for site in self.gates.units
                if (one := self.criteria[site.kind]).gradient or one.activation
            }
        )

    def renew(self) -> None:
        """Forget all examples, but for the scores of criteria that accumulate."""
        old = self.scores.sums
        self.reset()
        for key in old:
            if self.criteria[key[0]].accumulates:
                self.scores.sums[key] = old[key]

    @property
    def needs_gradients(self) -> bool:
        """Whether a backward pass is needed."""
        return any(criterion.gradient for criterion in self.criteria.values())

    @property
    def needs_data(self) -> bool:
        """Whether the model has to run at all."""
        return bool(self.scores.sums)

    @property
    def needs_loss(self) -> bool:
        """Whether the loss by the labels is needed, for a batch that has them."""
        return any(c.gradient and not self._by_predictions(c) for c in self.criteria.values())

    def start(self) -> None:
        """Listen to the gates from now on."""
        self.gates.on_gradient = self._on_gradient if self.needs_gradients else None
        listens = any(criterion.activation for criterion in self.criteria.values())
        self.gates.on_activation = self._on_activation if listens else None
        self.gates.on_output = self._on_output

    def stop(self) -> None:
        """Listen no more."""
        self.gates.on_gradient = self.gates.on_activation = self.gates.on_output = None

    def result(
        self,
        model: PreTrainedModel,
        seed: int,
        data: Iterable[Mapping[str, Any]] = (),
        progress: bool = False,
    ) -> dict[Key, torch.Tensor]:
        """Return the mean scores over all examples of all ranks, `[units]` by site.

        Args:
            model: The model.
            seed: Seed of whatever a criterion draws.
            data: Examples for criteria that score by removal.
            progress: Whether these show a progress bar.

        Raises:
            ValueError: There were no examples, or a score is not finite.
        """
        scores: dict[Key, torch.Tensor] = {}
        if self.needs_data:
            scores = self.scores.reduce().mean()
        used = list(dict.fromkeys(self.names.values()))
        for name in used:
            criterion = CRITERIA[name]
            units = self.gates.units.of([k for k, other in self.names.items() if other == name])
            if criterion.weights:
                scores |= criterion.weights(model, units, seed)
            if criterion.removal:
                batches = list(data)
                if any("labels" not in batch and "label" not in batch for batch in batches):
                    check_labels(self.names)
                scores |= criterion.removal(model, units, batches, progress)
            if criterion.per_layer:
                own = {(s.kind, s.path) for s in units if s.kind != "layers"}
                scores |= importance.normalise({key: scores[key] for key in own})
        if len(used) > 1:
            scores = same_total(scores)
        Scores(scores, 1).mean()
        return scores

    def _counts(self) -> bool:
        share = share_of(self.gates.model)
        return share is None or share.counts

    def _scale(self, examples: int) -> float:
        """Return what makes the gradient of the loss one of a sum over examples."""
        if not self.mean_loss:
            return 1.0
        share = share_of(self.gates.model)
        return examples if share is None else 1 / share.weight

    def _by_predictions(self, criterion: Criterion) -> bool:
        return criterion.loss == "predictions" or self.unlabelled

    def _on_gradient(self, site: Site, index: int, gradient: torch.Tensor) -> None:
        criterion = self.criteria[site.kind]
        wanted = criterion.temperature if self._by_predictions(criterion) else None
        if criterion.gradient and wanted == self._temperature and self._counts():
            gradient = gradient * (self._scale(len(gradient)) if wanted is None else 1.0)
            score = criterion.gradient
            self._add(site, index, lambda rows: score(gradient[rows]))

    def _on_activation(
        self, site: Site, index: int, before: torch.Tensor, after: torch.Tensor
    ) -> None:
        score = self.criteria[site.kind].activation
        if score is None or not self._counts():
            return
        before, after = (x.reshape(self.gates.examples, -1, x.shape[-1]) for x in (before, after))
        weight = self.gates.padding
        if weight is not None and site.experts.inside and after.shape[1] % weight.shape[1] == 0:
            # A position goes to several experts.
            weight = weight.repeat_interleave(after.shape[1] // weight.shape[1], dim=1)
        if weight is None or weight.shape != after.shape[:2]:
            weight = torch.ones(after.shape[:2], device=after.device)
        seen = Seen(site, before, after, weight, self._projection(site))
        # What several modules take is seen several times.
        times = max(len(site.feeds), 1)
        self._add(site, index, lambda rows: score(seen.of(rows)) / times)

    def _add(self, site: Site, index: int, score: Callable[[Rows], torch.Tensor]) -> None:
        """Add the score of the current batch, or of each class in it, to the sums."""
        if not self.by_class:
            self.scores.add(site, index, score(slice(None)))
            return
        for number in self.labels.unique().tolist():
            part = score(self.labels == number)
            self.scores.add(site, index, part)
            self.by_class[number].add(site, index, part)

    def _on_output(self, output: Any) -> None:
        if self._counts():
            self.scores.count += self.gates.examples
        for number, one in enumerate(self.by_class):
            one.count += int((self.labels == number).sum())
        if not torch.is_grad_enabled():
            return
        problem = self.problem or problem_type(self.gates.model.config)  # type: ignore[arg-type]
        by_predictions = (c for c in self.criteria.values() if self._by_predictions(c))
        for temperature in {c.temperature for c in by_predictions if c.gradient}:
            roots = importance.divergence_roots(logits_of(output), problem, temperature)
            self._temperature = temperature
            for root in roots.sum(0):
                torch.autograd.grad(root, self.gates.anchors, retain_graph=True, allow_unused=True)
            self._temperature = None

    def _projection(self, site: Site) -> torch.Tensor | None:
        """Return the weight that a site's gated features meet, `[outputs, features]`."""
        for cut in site.cuts:
            in_order = site.feeds[0].blocks == 1
            if cut.module == site.gate and cut.tensor == "weight" and in_order:
                weight = self.gates.model.get_submodule(cut.module).get_parameter("weight")
                if site.kind == "heads" and weight.shape[cut.dim] != site.size * site.width:
                    return None
                return weight.detach().movedim(cut.dim, -1)
        return None


def collect(
    model: PreTrainedModel,
    units: Units,
    data: Iterable[Mapping[str, Any]],
    criteria: Mapping[Kind, str],
    seed: int = 0,
    progress: bool = True,
) -> dict[Key, torch.Tensor]:
    """Score units on calibration data; the model is not changed.

    `fisher` is of the loss by the labels. Where the data has none, it is the Fisher information of
    the model's own predictions (Kunstner et al. 2019, arXiv 1905.12558), exact up to eight classes.

    Args:
        model: The model, not a wrapper.
        units: The sites to score.
        data: Batches of model inputs, with or without `labels`.
        criteria: The name of the criterion of each kind of unit.
        seed: Seed of random scores.
        progress: Whether to show a progress bar.

    Returns:
        Mean scores by site, `[units]`, float64.

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
    """Let a collector see calibration data, from nothing on; the model is not changed.

    Batches that do not fit into memory are halved.

    Raises:
        ValueError: A batch or label does not fit, or a criterion needs labels and there are none.
    """

    def once(batches: Iterable[Mapping[str, Any]]) -> None:
        collector.reset()
        with collector.gates, evaluating(model), frozen(model):
            collector.start()
            for batch in track(batches, "scoring", disable=not progress, transient=True):
                _score(model, collector, batch)

    fitting(once, data)
    logger.info("scored %s on %d examples", collector.names, collector.scores.count)


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Let no parameter ask for a gradient inside the block."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _score(model: PreTrainedModel, collector: Collector, batch: Mapping[str, Any]) -> None:
    """Run a batch forward, and backward where a criterion asks for the loss by the labels."""
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


def same_total(scores: dict[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
    """Scale scores of different criteria so that those of each kind add up to 1."""
    totals: dict[Kind, float] = {}
    for (kind, _), value in scores.items():
        totals[kind] = totals.get(kind, 0.0) + value.sum().item()
    logger.info("criteria differ between kinds: the scores of each kind are scaled to a sum of 1")
    return {key: value / max(totals[key[0]], 1e-30) for key, value in scores.items()}
