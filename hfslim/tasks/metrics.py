"""Metrics of scikit-learn and SciPy as `evaluate.Metric`s, which need no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import datasets
import evaluate
import numpy as np
from scipy import stats
from sklearn import metrics as sk
from transformers import EvalPrediction

from hfslim.anatomy.outputs import ProblemType


class ScoreFunction(NamedTuple):
    """A function of references and predictions, and the problems that it suits."""

    compute: Callable[..., float]
    problems: tuple[ProblemType, ...]
    description: str


_f1: Any = partial(sk.f1_score, zero_division=0)
_ONE: tuple[ProblemType, ...] = ("single_label_classification",)
_ANY: tuple[ProblemType, ...] = (*_ONE, "multi_label_classification")
_VALUE: tuple[ProblemType, ...] = ("regression",)

SCORES: Mapping[str, ScoreFunction] = {
    "accuracy": ScoreFunction(sk.accuracy_score, _ANY, "Fraction of examples right in every class"),
    "f1_macro": ScoreFunction(partial(_f1, average="macro"), _ANY, "Mean over classes of their F1"),
    "f1_binary": ScoreFunction(partial(_f1, average="binary"), _ONE, "F1 of the positive class"),
    "matthews_correlation": ScoreFunction(sk.matthews_corrcoef, _ONE, "Correlation of classes"),
    "pearson": ScoreFunction(lambda r, p: stats.pearsonr(p, r)[0], _VALUE, "Correlation of values"),
    "spearman": ScoreFunction(lambda r, p: stats.spearmanr(p, r)[0], _VALUE, "The same of ranks"),
}


class LocalMetric(evaluate.Metric):
    """An `evaluate.Metric` that computes one of `SCORES`.

    Args:
        name: A key of `SCORES`.
        multi_label: Whether predictions and references are 0/1 vectors, `[examples, classes]`.
        positive: The positive class of `f1_binary`.
    """

    name = ""

    def __init__(
        self, name: str, multi_label: bool = False, positive: int = 1, **kwargs: Any
    ) -> None:
        self.name, self._score, self._multi_label = name, SCORES[name], multi_label
        self._options = {"pos_label": positive} if name == "f1_binary" else {}
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        value: Any = datasets.Value("float32" if self._score.problems == _VALUE else "int32")
        feature = datasets.Sequence(value) if self._multi_label else value
        return evaluate.MetricInfo(
            description=self._score.description,
            citation="",
            features=datasets.Features({"predictions": feature, "references": feature}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        values = np.asarray(references), np.asarray(predictions)
        score = self._score.compute(*values, **self._options)
        return {self.name: float(score)}


METRICS: Mapping[str, Callable[..., LocalMetric]] = {
    name: partial(LocalMetric, name) for name in SCORES
}


def usual_metric(problem: ProblemType) -> str:
    """Return the first metric that suits a problem."""
    return next(name for name, score in SCORES.items() if problem in score.problems)


def decide(logits: np.ndarray, problem: ProblemType) -> np.ndarray:
    """Return the predictions of logits `[examples, classes]`.

    They are classes `[examples]`, 0/1 vectors `[examples, classes]` or values `[examples]`.
    """
    if problem == "single_label_classification":
        return logits.argmax(-1)
    if problem == "multi_label_classification":
        return (logits > 0).astype(np.int32)
    return logits.reshape(len(logits))


def compute_metrics(
    name: str, problem: ProblemType, classes: int, positive: int = 1
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the Trainer's `compute_metrics` for a metric, a key of `METRICS`.

    `positive` is the positive class of `f1_binary`.

    Raises:
        ValueError: The metric does not suit the problem.
    """
    if problem not in SCORES[name].problems:
        fitting = [metric for metric, score in SCORES.items() if problem in score.problems]
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
        metric = METRICS[name](multi_label=multi_label, positive=positive)
        references = np.asarray(prediction.label_ids)
        if multi_label:
            references = references.astype(np.int32)
        result = metric.compute(
            predictions=decide(np.asarray(logits), problem), references=references
        )
        return dict(result or {})

    return compute
