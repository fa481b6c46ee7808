"""Metrics that need no network, as `evaluate.Metric` subclasses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import datasets
import evaluate
import numpy as np
from scipy import stats
from sklearn import metrics as sk
from transformers import EvalPrediction

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


class LocalMetric(evaluate.Metric, ABC):
    """An `evaluate.Metric` whose score is a function of predictions and references.

    Args:
        multi_label: Whether predictions and references are 0/1 vectors, `[examples, classes]`.
    """

    name = ""
    dtype = "int32"

    def __init__(self, multi_label: bool = False, **kwargs: Any) -> None:
        self._multi_label = multi_label
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        value: Any = datasets.Value(self.dtype)
        feature = datasets.Sequence(value) if self._multi_label else value
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            features=datasets.Features({"predictions": feature, "references": feature}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {self.name: float(self.score(np.asarray(references), np.asarray(predictions)))}

    @abstractmethod
    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        """Return the score of `predictions` against `references`."""


class Accuracy(LocalMetric):
    """Share of examples that are right; for multi-label, right in every class."""

    name = "accuracy"

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        """Return the share of exact matches."""
        return sk.accuracy_score(references, predictions)


class F1Macro(LocalMetric):
    """Mean over classes of the harmonic mean of precision and recall."""

    name = "f1_macro"

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        """Return the unweighted mean of the classes' F1."""
        return sk.f1_score(references, predictions, average="macro", zero_division=0)


class F1Binary(LocalMetric):
    """F1 of the second of two classes (index 1), as GLUE scores MRPC and QQP."""

    name = "f1_binary"

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        """Return the F1 of class 1."""
        return sk.f1_score(references, predictions, average="binary", zero_division=0)


class MatthewsCorrelation(LocalMetric):
    """Correlation between predicted and true classes, as GLUE scores CoLA."""

    name = "matthews_correlation"

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        """Return Matthews' correlation coefficient."""
        return sk.matthews_corrcoef(references, predictions)


class Pearson(LocalMetric):
    """Linear correlation between predicted and true values."""

    name = "pearson"
    dtype = "float32"

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        """Return Pearson's correlation coefficient."""
        return stats.pearsonr(predictions, references)[0]


class Spearman(LocalMetric):
    """Correlation between the ranks of predicted and true values."""

    name = "spearman"
    dtype = "float32"

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        """Return Spearman's rank correlation coefficient."""
        return stats.spearmanr(predictions, references)[0]


METRICS: Mapping[str, type[LocalMetric]] = {
    cls.name: cls for cls in (Accuracy, F1Macro, F1Binary, MatthewsCorrelation, Pearson, Spearman)
}
SUITS: Mapping[str, tuple[Problem, ...]] = {
    "accuracy": ("single_label_classification", "multi_label_classification"),
    "f1_macro": ("single_label_classification", "multi_label_classification"),
    "f1_binary": ("single_label_classification",),
    "matthews_correlation": ("single_label_classification",),
    "pearson": ("regression",),
    "spearman": ("regression",),
}


def usual_metric(problem: Problem) -> str:
    """Return the first metric that suits a problem."""
    return next(name for name, problems in SUITS.items() if problem in problems)


def decide(logits: np.ndarray, problem: Problem) -> np.ndarray:
    """Turn logits into predictions.

    Args:
        logits: `[examples, classes]`.
        problem: What the classes mean.

    Returns:
        Class indices `[examples]`, 0/1 vectors `[examples, classes]` or values `[examples]`.
    """
    if problem == "single_label_classification":
        return logits.argmax(-1)
    if problem == "multi_label_classification":
        return (logits > 0).astype(np.int32)
    return logits.reshape(len(logits))


def compute_metrics(
    name: str, problem: Problem, classes: int
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the Trainer's `compute_metrics` for a metric.

    Args:
        name: A key of `METRICS`.
        problem: What the model predicts.
        classes: Number of classes, 1 for regression.

    Raises:
        ValueError: The metric does not suit the problem.
    """
    if problem not in SUITS[name]:
        fitting = [metric for metric, problems in SUITS.items() if problem in problems]
        raise ValueError(
            f"metric {name!r} does not suit {problem}, which the labels decide: use {fitting}"
        )
    if name == "f1_binary" and classes != 2:
        raise ValueError(
            f"metric 'f1_binary' needs two classes, the data have {classes}: use 'f1_macro'"
        )
    multi_label = problem == "multi_label_classification"

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        outputs = prediction.predictions
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        metric = METRICS[name](multi_label=multi_label)
        references = np.asarray(prediction.label_ids)
        if multi_label:
            references = references.astype(np.int32)
        result = metric.compute(
            predictions=decide(np.asarray(logits), problem), references=references
        )
        return dict(result or {})

    return compute
