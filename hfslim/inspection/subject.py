"""The model that `hfslim inspect` looks at, and what can be found out about it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.structure import Kind
from hfslim.anatomy.units import Units
from hfslim.inspection import layer_similarity, prediction_changes, unit_agreement
from hfslim.inspection.differences import Agreement, Lost
from hfslim.inspection.findings import ClassesFinding, Finding, Importance, Similarity
from hfslim.pipeline.opening import open_classifier
from hfslim.pipeline.schema import RecipeError
from hfslim.pipeline.task_examples import Workbench
from hfslim.pruning.gates.gates import Key
from hfslim.pruning.scores.batches import Batches
from hfslim.pruning.scores.by_class import ClassImportance, importance_by_class
from hfslim.pruning.steps import calibrate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A model, and what it is looked at with.

    Attributes:
        name: Hub id or folder.
        model: The model.
        units: The sites that are scored.
        criteria: The criterion of each kind of unit.
        bench: The examples, prepared for the model; None without `--data`.
        by_class: Whether units are scored for each class too.
        max_examples: Training examples to use at most.
        seed: Seed of whatever is drawn.
        progress: Whether to show progress bars.
    """

    name: str
    model: PreTrainedModel
    units: Units
    criteria: Mapping[Kind, str]
    bench: Workbench | None
    by_class: bool
    max_examples: int
    seed: int
    progress: bool

    @cached_property
    def batches(self) -> Batches:
        """The training examples to score units on."""
        data = self.bench.calibration(self.model, self.max_examples) if self.bench else []
        return Batches(data, self.max_examples)

    @cached_property
    def parts(self) -> ClassImportance:
        """Importance of every unit, for all and by class."""
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
        """Importance of every unit by kind and site, `[units]`."""
        if self.by_class:
            return self.parts.scores
        return calibrate(
            self.model, self.units, self.batches, self.criteria, self.seed, self.progress, "none"
        ).scores

    def importance(self, title: str) -> Importance:
        """Tell how much the units matter."""
        if self.by_class:
            return ClassesFinding(title, self.units, self.scores, self.parts)
        return Importance(title, self.units, self.scores)

    def similarity(self) -> Similarity:
        """Compare the layers."""
        values = layer_similarity(
            self.model, self.batches, max_examples=self.max_examples, progress=self.progress
        )
        return Similarity(values)

    def agreement(self, source: str, scores: Mapping[Key, torch.Tensor]) -> Agreement:
        """Compare with another scoring of the units, from a source."""
        return Agreement(source, unit_agreement(scores, self.scores))

    def against(self, source: str, bench: Workbench | None) -> list[Finding]:
        """Compare with another model.

        Args:
            source: Hub id or folder.
            bench: The examples, prepared for the other model; None where there are none.
        """
        model = bench.load_model(source) if bench else open_classifier(source)[1]
        units = find_units(model).of(self.criteria)
        findings: list[Finding] = []
        if _sizes(units) == _sizes(self.units):
            other = replace(
                self, name=source, model=model, units=units, bench=bench, by_class=False
            )
            findings.append(self.agreement(source, other.scores))
        else:
            logger.info("%s has other units: no agreement of units is told", source)
        if bench and self.bench:
            findings.append(self._lost(source, model, bench))
        return findings

    def _lost(self, source: str, model: PreTrainedModel, bench: Workbench) -> Lost:
        assert self.bench is not None
        labels, columns = self.bench.examples.labels, self.bench.examples.columns
        names = list(labels.names)
        if labels.problem != "single_label_classification":
            raise ValueError("--against tells changes where examples have one class each")
        order = [list(bench.examples.labels.names).index(name) for name in names]
        before = bench.predict(model, self.progress).logits[:, order]
        after = self.bench.predict(self.model, self.progress).logits
        held = self.bench.examples.evaluation
        right = np.asarray(labels.encode(held[columns[-1]])).astype(np.int64)
        changes = prediction_changes(before, after, right, names)
        texts = {}
        if not self.bench.task.lazy:
            for change in changes.changes:
                row = held[change.example]
                texts[change.example] = " | ".join(str(row[column]) for column in columns[:-1])
        return Lost(source, changes, texts)


def saved_scores(path: str) -> dict[Key, torch.Tensor]:
    """Read the scores that `hfslim inspect --json` printed.

    Raises:
        RecipeError: The file is not there, or holds something else.
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
    return {(site.kind, site.path): site.size for site in units}
