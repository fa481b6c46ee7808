"""The model that `hfslim inspect` inspects, and its findings."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.structure import Key, Kind
from hfslim.anatomy.units import Units
from hfslim.inspection import layer_similarity, prediction_changes, unit_agreement
from hfslim.inspection.differences import Agreement, PredictionChanges
from hfslim.inspection.findings import Finding, Importance, ImportanceByClass, Similarity
from hfslim.pipeline.opening import open_classifier
from hfslim.pipeline.schema import RecipeError
from hfslim.pipeline.task_examples import TaskExamples
from hfslim.pruning.scores.batches import Batches
from hfslim.pruning.scores.by_class import ClassImportance, importance_by_class
from hfslim.pruning.steps import calibrate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A model, its examples and the settings of the inspection.

    Attributes:
        model: The model.
        units: The sites that are scored.
        criteria: The criterion of each kind of unit.
        examples: The examples, prepared for the model; None without `--data`.
        by_class: Whether units are scored for each class too.
        max_examples: The maximal number of training examples.
        seed: Seed of every draw.
        progress: Whether to show progress bars.
    """

    model: PreTrainedModel
    units: Units
    criteria: Mapping[Kind, str]
    examples: TaskExamples | None
    by_class: bool
    max_examples: int
    seed: int
    progress: bool

    @cached_property
    def batches(self) -> Batches:
        """The training examples on which units are scored."""
        data = self.examples.calibration(self.model, self.max_examples) if self.examples else []
        return Batches(data, self.max_examples)

    @cached_property
    def parts(self) -> ClassImportance:
        """The importance of every unit, for all examples and by class."""
        return importance_by_class(
            self.model,
            self.batches,
            list(self.criteria),
            self.criteria,
            self.max_examples,
            self.progress,
        )

    @cached_property
    def scores(self) -> Mapping[Key, torch.Tensor]:
        """The importance of every unit by kind and site, `[units]`."""
        if self.by_class:
            return self.parts.scores
        return calibrate(
            self.model, self.units, self.batches, self.criteria, self.seed, self.progress, "none"
        ).scores

    def importance(self, title: str) -> Importance:
        """Return the importance of the units."""
        if self.by_class:
            return ImportanceByClass(title, self.units, self.scores, self.parts)
        return Importance(title, self.units, self.scores)

    def similarity(self) -> Similarity:
        """Compare the layers."""
        values = layer_similarity(
            self.model, self.batches, max_examples=self.max_examples, progress=self.progress
        )
        return Similarity(values)

    def compare_scores(self, source: str, scores: Mapping[Key, torch.Tensor]) -> Agreement:
        """Compare with another scoring of the units."""
        return Agreement(source, unit_agreement(scores, self.scores))

    def compare_model(self, source: str, examples: TaskExamples | None) -> list[Finding]:
        """Compare with another model, for which the examples are prepared too."""
        model = examples.load_model(source) if examples else open_classifier(source)[1]
        units = find_units(model).of(self.criteria)
        findings: list[Finding] = []
        if _sizes(units) == _sizes(self.units):
            other = replace(self, model=model, units=units, examples=examples, by_class=False)
            findings.append(self.compare_scores(source, other.scores))
        else:
            logger.info("%s has other units: their agreement is not computed", source)
        if examples and self.examples:
            findings.append(self._compare_predictions(source, model, examples))
        return findings

    def _compare_predictions(
        self, source: str, model: PreTrainedModel, examples: TaskExamples
    ) -> PredictionChanges:
        own: Any = self.examples
        labels, columns, held = own.examples.labels, own.examples.columns, own.examples.evaluation
        if labels.problem != "single_label_classification":
            raise ValueError("--against compares predictions of examples that have one class each")
        order = [examples.examples.labels.names.index(name) for name in labels.names]
        before = examples.predict(model, self.progress).logits[:, order]
        after = own.predict(self.model, self.progress).logits
        changes = prediction_changes(before, after, own.classes(), list(labels.names))
        texts = {}
        if not own.task.lazy:
            for change in changes.changes:
                row = held[change.example]
                texts[change.example] = " | ".join(str(row[column]) for column in columns[:-1])
        return PredictionChanges(source, changes, texts)


def saved_scores(path: str) -> dict[Key, torch.Tensor]:
    """Read the scores that `hfslim inspect --json` printed.

    Raises:
        RecipeError: The file does not exist, or holds something else.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["units"]
        return {(r["kind"], r["path"]): torch.tensor(r["scores"]).double() for r in rows}
    except OSError as error:
        raise RecipeError(f"--against {path!r} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"--against {path!r}: expected what `hfslim inspect --json` prints, found no scores"
        ) from error


def _sizes(units: Units) -> dict[Key, int]:
    return {site.key: site.size for site in units}
