"""Sums of scores, gathered from what the gates of a running model report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hfslim.anatomy.structure import Key, Kind
from hfslim.anatomy.units import Site
from hfslim.pruning.gates.gates import Gates
from hfslim.pruning.scores import importance
from hfslim.pruning.scores.criteria import CRITERIA, Criterion, GatedActivations, Rows, check_labels
from hfslim.pruning.scores.importance import Scores
from hfslim.training.batch_shares import share_of
from hfslim.training.objective import ProblemType, logits_of, problem_type

logger = logging.getLogger(__name__)


class Collector:
    """Sums the scores of a model's units, from its gates.

    Args:
        gates: The gates, attached or not.
        criteria: The name of the criterion of each kind of unit.
        mean_loss: Whether the loss that is back-propagated is a mean over the batch, not a sum.
        classes: Number of classes whose scores are also summed separately; 0 for none.

    Attributes:
        scores: The sums so far, of this rank.
        by_class: The same sums over the examples of each class alone.
        labels: The class of each example of the current batch, for `by_class`.
        unlabelled: Whether the current batch has no labels, so that predictions replace them.
        problem: What the model's logits mean; by its config if None.
    """

    def __init__(
        self, gates: Gates, criteria: Mapping[Kind, str], mean_loss: bool = False, classes: int = 0
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
        self.scores = self._zeros()
        self.reset()

    def reset(self, keep_accumulated: bool = False) -> None:
        """Set the sums to zero, except those of accumulating criteria if these are kept."""
        old, self.scores = self.scores.sums, self._zeros()
        self.by_class = [self._zeros() for _ in range(self.classes)]
        if keep_accumulated:
            kept = {key: value for key, value in old.items() if self.criteria[key[0]].accumulates}
            self.scores.sums |= kept

    def _zeros(self) -> Scores:
        return Scores(
            {
                site.key: torch.zeros(site.size, dtype=torch.float64)
                for site in self.gates.units
                if (one := self.criteria[site.kind]).gradient or one.activation
            }
        )

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
        """Register the callbacks of the gates."""
        self.gates.on_gradient = self._on_gradient if self.needs_gradients else None
        has_activations = any(criterion.activation for criterion in self.criteria.values())
        self.gates.on_activation = self._on_activation if has_activations else None
        self.gates.on_output = self._on_output

    def stop(self) -> None:
        """Remove the callbacks of the gates."""
        self.gates.on_gradient = self.gates.on_activation = self.gates.on_output = None

    def result(
        self,
        model: PreTrainedModel,
        seed: int,
        data: Iterable[Mapping[str, Any]] = (),
        progress: bool = False,
    ) -> dict[Key, torch.Tensor]:
        """Return the mean scores over all examples of all ranks, `[units]` by site."""
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
                own = {s.key for s in units if s.kind != "layers"}
                scores |= importance.normalise({key: scores[key] for key in own})
        if len(used) > 1:
            scores = same_total(scores)
        Scores(scores, 1).mean()
        return scores

    def _counts(self) -> bool:
        share = share_of(self.gates.model)
        return share is None or share.counts

    def _scale(self, examples: int) -> float:
        """Return the factor from the gradient of the loss to that of a sum over examples."""
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
            # Each position is routed to several experts.
            weight = weight.repeat_interleave(after.shape[1] // weight.shape[1], dim=1)
        if weight is None or weight.shape != after.shape[:2]:
            weight = torch.ones(after.shape[:2], device=after.device)
        batch = GatedActivations(site, before, after, weight, self._projection(site))
        # The input of several modules is reported several times.
        times = max(len(site.feeds), 1)
        self._add(site, index, lambda rows: score(batch.of(rows)) / times)

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
            factors = importance.fisher_factors(logits_of(output), problem, temperature)
            self._temperature = temperature
            for factor in factors.sum(0):
                torch.autograd.grad(
                    factor, self.gates.anchors, retain_graph=True, allow_unused=True
                )
            self._temperature = None

    def _projection(self, site: Site) -> torch.Tensor | None:
        """Return the weight of the projection of a site's features, `[outputs, features]`."""
        for cut in site.cuts:
            in_order = site.feeds[0].blocks == 1
            if cut.module == site.gate and cut.tensor == "weight" and in_order:
                weight = self.gates.model.get_submodule(cut.module).get_parameter("weight")
                if site.kind == "heads" and weight.shape[cut.dim] != site.size * site.width:
                    return None
                return weight.detach().movedim(cut.dim, -1)
        return None


def same_total(scores: dict[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
    """Scale scores of different criteria so that the scores of each kind add up to 1."""
    totals: dict[Kind, float] = {}
    for (kind, _), value in scores.items():
        totals[kind] = totals.get(kind, 0.0) + value.sum().item()
    logger.info("criteria differ between kinds: the scores of each kind are scaled to a sum of 1")
    return {key: value / max(totals[key[0]], 1e-30) for key, value in scores.items()}
