"""A model's answers, class by class, beside its teacher's: losses that an average may hide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit, softmax

__all__ = ["ClassAnswers", "ClassLine", "calibration_error", "churn", "decimals"]

BINS = 15
HIDDEN = 0.1
"""Loss of a class beyond that of all examples from which on `hidden` warns."""


def decimals(examples: int | None) -> int:
    """Return the number of decimals that a share of so many examples has, 2 to 4."""
    return 4 if examples is None else min(max(len(str(examples)), 2), 4)


def churn(first: np.ndarray, second: np.ndarray) -> float:
    """Return the fraction of examples that two models answer differently.

    Fard et al., "Launch and Iterate: Reducing Prediction Churn", NeurIPS 2016.

    Args:
        first: Classes `[examples]`, or 0/1 vectors `[examples, classes]`, compared as a whole.
        second: Likewise.
    """
    return float((first != second).reshape(len(first), -1).any(1).mean())


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Return the expected calibration error: how far confidence is from being right, on average.

    Answers are put into bins of equal width by their confidence; ECE = Σ_b n_b / n · |share right
    in b − mean confidence in b|. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Args:
        confidence: Probability of each answer, in [0, 1], `[answers]`.
        right: Whether it is right, `[answers]`.
        bins: Number of bins; a bin holds its upper end.
    """
    places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(places, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


class ClassLine(NamedTuple):
    """The fraction of a class's examples that are answered right.

    Attributes:
        name: The class.
        examples: Number of its examples.
        teacher: The teacher's fraction; None without a teacher.
        model: The model's fraction.
        significant: Whether more was lost than chance explains: of the examples on which exactly
            one of the two is right, the teacher's exceed the model's by over two standard errors.
    """

    name: str
    examples: int
    teacher: float | None
    model: float
    significant: bool

    @property
    def change(self) -> float | None:
        """The model's fraction minus the teacher's; None without a teacher."""
        return None if self.teacher is None else self.model - self.teacher


@dataclass(frozen=True)
class ClassAnswers:
    """The answers of a model, and of its teacher if there is one, on the same labelled examples.

    Attributes:
        classes: Names of the classes, in the order of the fields below.
        examples: Number of examples.
        right: For each class the number of its examples that `[both, only the teacher, only the
            model, neither]` answers right; without a teacher the first and the second are 0. An
            example of several classes counts in each.
        confusion: `[classes, classes]`, true classes down; None if an example may have several.
        teacher_confusion: Likewise for the teacher.
        ece: Expected calibration error of the model.
        teacher_ece: Likewise for the teacher.
        churn: Fraction of examples that the two answer differently.
    """

    classes: tuple[str, ...]
    examples: int
    right: tuple[tuple[int, int, int, int], ...]
    confusion: list[list[int]] | None
    teacher_confusion: list[list[int]] | None
    ece: float
    teacher_ece: float | None
    churn: float | None

    @classmethod
    def of(
        cls,
        classes: Sequence[str],
        references: np.ndarray,
        logits: np.ndarray,
        teacher: np.ndarray | None = None,
    ) -> ClassAnswers:
        """Compare logits with the true classes.

        Args:
            classes: Names in the order of the logits.
            references: Classes `[examples]`, or 0/1 vectors `[examples, classes]`.
            logits: The model's, `[examples, classes]`.
            teacher: The teacher's.
        """
        several = references.ndim == 2
        own = _Side(references, logits)
        other = None if teacher is None else _Side(references, teacher)
        truth = references.astype(bool) if several else np.eye(len(classes), dtype=bool)[references]
        theirs = np.zeros_like(own.found) if other is None else other.found
        right = [
            (int((m & t).sum()), int((t & ~m).sum()), int((m & ~t).sum()), int((~m & ~t).sum()))
            for m, t in ((own.found[has, c], theirs[has, c]) for c, has in enumerate(truth.T))
        ]

        def table(side: _Side | None) -> list[list[int]] | None:
            if several or side is None:
                return None
            count = len(classes)
            flat = np.bincount(references * count + side.decided, minlength=count**2)
            return flat.reshape(count, count).tolist()

        return cls(
            classes=tuple(classes),
            examples=len(references),
            right=tuple(right),
            confusion=table(own),
            teacher_confusion=table(other),
            ece=own.ece,
            teacher_ece=None if other is None else other.ece,
            churn=None if other is None else churn(own.decided, other.decided),
        )

    @classmethod
    def pooled(cls, parts: Sequence[ClassAnswers]) -> ClassAnswers:
        """Add up the answers of several runs; calibration error and churn are means."""
        first = parts[0]
        if any(part.classes != first.classes for part in parts):
            raise ValueError(f"answers of other classes than {list(first.classes)}")

        def added(name: str) -> Any:
            tables = [getattr(part, name) for part in parts]
            return None if None in tables else np.sum(tables, axis=0).tolist()

        def mean(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return None if None in values else float(np.mean(values))

        return cls(
            classes=first.classes,
            examples=sum(part.examples for part in parts),
            right=tuple(tuple(row) for row in added("right")),
            confusion=added("confusion"),
            teacher_confusion=added("teacher_confusion"),
            ece=mean("ece"),
            teacher_ece=mean("teacher_ece"),
            churn=mean("churn"),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClassAnswers:
        """Rebuild from the result of `to_dict`."""
        right = tuple(tuple(row) for row in values["right"])
        return cls(**{**values, "classes": tuple(values["classes"]), "right": right})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher answered too."""
        return self.churn is not None

    def lines(self) -> list[ClassLine]:
        """Return a line for each class that has examples."""
        lines = []
        for name, (both, teacher, model, neither) in zip(self.classes, self.right, strict=True):
            count = both + teacher + model + neither
            if count:
                theirs = (both + teacher) / count if self.has_teacher else None
                beyond = self.has_teacher and teacher - model > 2 * (teacher + model) ** 0.5
                lines.append(ClassLine(name, count, theirs, (both + model) / count, beyond))
        return lines

    def worst(self) -> ClassLine | None:
        """Return the class that lost most against the teacher; None without one."""
        lines = self.lines() if self.has_teacher else []
        return min(lines, key=lambda line: line.change or 0.0, default=None)

    def chance_explains(self) -> bool:
        """Return whether chance explains how many more answers are right, or wrong, than before.

        It does where the examples on which exactly one of the two models is right are split as
        evenly as two standard errors allow.
        """
        lost, won = np.asarray(self.right).sum(0)[1:3]
        return bool(abs(lost - won) <= 2 * (lost + won) ** 0.5)

    def notes(self) -> list[str]:
        """Return calibration error, churn and the worst class in words."""
        digits = decimals(self.examples)
        notes = [f"Expected calibration error, {BINS} bins: {self.ece:.{digits}f}."]
        worst = self.worst()
        if worst is not None:
            change = worst.change or 0.0
            points = f"{change:+.{decimals(worst.examples)}f}"
            lost = f"Worst class: {worst.name}, {points}." if change < 0 else "No class lost."
            notes = [
                f"{notes[0][:-1]}, of the teacher {self.teacher_ece:.{digits}f}.",
                f"Churn: {self.churn:.1%} of the answers differ from the teacher's.",
                lost,
            ]
        return notes

    def hidden(self) -> list[str]:
        """Return a warning for each class whose loss the average hides.

        It lost 0.1 more than all classes' examples together, and more than chance explains.
        """
        counts = np.asarray(self.right).sum(0)
        mean = float(counts[1] - counts[2]) / max(counts.sum(), 1)
        warnings = []
        for line in self.lines():
            if line.significant and -(line.change or 0.0) - mean >= HIDDEN:
                never = ""
                if self.confusion is not None:
                    column = self.classes.index(line.name)
                    if not any(row[column] for row in self.confusion):
                        never = ", and nothing is taken for it any more"
                warnings.append(
                    f"class {line.name}: {line.model:.1%} of its {line.examples:,} examples are "
                    f"right, of the teacher {line.teacher:.1%}{never}; over all classes "
                    f"{mean:.1%} are lost, which hides it"
                )
        return warnings


class _Side:
    """The answers of one model: its decisions, whether it finds each class, its calibration."""

    def __init__(self, references: np.ndarray, logits: np.ndarray) -> None:
        logits = logits.astype(np.float64)
        if references.ndim == 2:
            self.decided = (logits > 0).astype(np.int64)
            self.found = self.decided.astype(bool)
            chance = expit(logits)
            sure = np.maximum(chance, 1 - chance).ravel()
            self.ece = calibration_error(sure, (self.decided == references).ravel())
        else:
            self.decided = logits.argmax(-1)
            self.found = np.eye(logits.shape[1], dtype=bool)[self.decided]
            sure = softmax(logits, axis=-1).max(-1)
            self.ece = calibration_error(sure, self.decided == references)
