"""Importance of every unit for each class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.outputs import label_names
from hfslim.anatomy.structure import KINDS, Key, Kind
from hfslim.pruning.gates.gates import Gates
from hfslim.pruning.scores.batches import Batches
from hfslim.pruning.scores.collect import run
from hfslim.pruning.scores.collector import Collector
from hfslim.pruning.scores.criteria import CRITERIA, Criteria, criteria_by_kind


@dataclass(frozen=True)
class ClassImportance:
    """Importance of every unit, in total and by the class of the examples.

    Attributes:
        classes: Names of the classes, in the model's order.
        examples: Number of examples of each, `[classes]`.
        scores: Importance over all examples by kind and site, `[units]`, as in `prune`.
        by_class: The part of the examples of each class, `[classes, units]` by kind and site; the
            sum over classes is `scores`.
    """

    classes: tuple[str, ...]
    examples: torch.Tensor
    scores: Mapping[Key, torch.Tensor]
    by_class: Mapping[Key, torch.Tensor]

    def shares(self, kind: Kind) -> dict[Key, torch.Tensor]:
        """Return each unit's share of the total importance of a kind, for all and for each class.

        Losses of hard classes have greater gradients; shares make classes comparable.

        Returns:
            `[1 + classes, units]` by kind and site: all examples first, then each class. Every row
            adds up to 1 over the sites of the kind, or is 0 for a class without examples.
        """
        rows = {
            key: torch.cat([total.unsqueeze(0), self.by_class[key]])
            for key, total in self.scores.items()
            if key[0] == kind
        }
        sums = sum((row.sum(1, keepdim=True) for row in rows.values()), torch.zeros(1, 1))
        return {key: row / sums.clamp_min(1e-300) for key, row in rows.items()}


def importance_by_class(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    units: Sequence[Kind] | None = None,
    criterion: Criteria = "fisher",
    max_examples: int = 512,
    progress: bool = True,
) -> ClassImportance:
    """Score units for each class, in the pass that scores them for all examples.

    Scores are sums over examples, so the scores of the classes add up to the total. Under several
    processes all ranks get the scores over the examples of all ranks.

    Args:
        model: The classifier, not a wrapper; unchanged.
        data: Batches of model inputs with `labels`, one class per example.
        units: Kinds of units; by default all that the model has.
        criterion: `fisher` (Kwon et al. 2022, arXiv 2204.09656), `taylor` (Michel et al. 2019,
            arXiv 1905.10650), or another that scores example by example.
        max_examples: Maximum number of examples, on each rank.
        progress: Whether to show a progress bar.

    Returns:
        Scores in total and by class. Where a criterion rescales the scores of a site or a kind, the
        scores by class are rescaled with them.

    Raises:
        ValueError: The data is empty or lacks a class for an example, the criterion does not score
            example by example, or scores are not finite.
    """
    found = find_units(model)
    kinds = units or [kind for kind in KINDS if any(site.kind == kind for site in found)]
    criteria = criteria_by_kind(criterion, kinds)
    by_example = [
        n for n, c in CRITERIA.items() if (c.gradient or c.activation) and not c.accumulates
    ]
    for kind, name in criteria.items():
        if name not in by_example:
            raise ValueError(
                f"criterion {name} for {kind} does not score example by example, so it has no "
                f"importance by class: use one of {by_example}"
            )
    names = label_names(model.config)
    collector = Collector(Gates(model, found.of(kinds)), criteria, classes=len(names))
    run(model, collector, Batches(data, max_examples), progress)
    scores = collector.result(model, seed=0)
    parts = [one.reduce() for one in collector.by_class]
    by_class = {}
    for key, score in scores.items():
        sums = torch.stack([part.sums[key] for part in parts])
        by_class[key] = sums * (score.sum() / sums.sum().clamp_min(1e-300))
    return ClassImportance(names, torch.tensor([part.count for part in parts]), scores, by_class)
