"""Check by a model's own answers that its outputs are paired with the right labels."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from hfslim.anatomy.outputs import ProblemType

CLEAR = 3.0
"""Standard deviations that set a score apart from chance."""


class Fit(NamedTuple):
    """How well a model's outputs fit labels, by standard deviations.

    Attributes:
        score: Balanced accuracy, or the mean correlation of outputs and labels for several labels.
        skill: The distance of the score from its mean under shuffled labels, in deviations.
        best: The output that fits each label best; None if no order of them is above chance.
        gain: The distance between the score of `best` and that of the pairing, in deviations.
    """

    score: float
    skill: float
    best: tuple[int, ...] | None
    gain: float


def fit_of(logits: np.ndarray, targets: np.ndarray, problem: ProblemType) -> Fit:
    """Judge the outputs of a model by labels that are encoded in their order.

    The best order is found on every other example and judged on the others, so that many classes
    with few examples do not make one up.

    Args:
        logits: `[examples, outputs]`.
        targets: `[examples]` integers or `[examples, outputs]` 0/1.
        problem: Classification with one or several labels per example.

    Examples:
        >>> logits, targets = np.eye(2)[[0, 1] * 20], np.array([1, 0] * 20)
        >>> fit = fit_of(logits, targets, "single_label_classification")
        >>> fit.score, fit.best, fit.skill < -CLEAR
        (0.0, (1, 0), True)
    """
    outputs = logits.shape[1]
    if problem == "single_label_classification":
        given, answers = np.eye(outputs)[targets], np.eye(outputs)[logits.argmax(-1)]
    else:
        given, answers = np.asarray(targets, float), np.asarray(logits, float)
    same = np.arange(outputs)
    score, skill = _skill(given, answers, same, problem)
    first, second = _halves(given)
    best = _best(given[first], answers[first], problem)
    _, above = _skill(given[second], answers[second], best, problem)
    gain = 0.0
    if (best != same).any() and above > 2:
        own = _each(given[second], answers[second], same, problem)
        theirs = _each(given[second], answers[second], best, problem)
        change = theirs - own
        gain = float(change.sum() / max(math.sqrt((change**2).sum()), 1e-12))
    found = tuple(map(int, _best(given, answers, problem))) if above > 2 else None
    return Fit(score, skill, found, gain)


def _halves(given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split examples into halves that have the same labels."""
    ordered = np.lexsort(given.T)
    return ordered[::2], ordered[1::2]


def _units(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean(0)
    return centred / np.maximum(np.sqrt((centred**2).sum(0)), 1e-12)


def _each(
    given: np.ndarray, answers: np.ndarray, order: np.ndarray, problem: ProblemType
) -> np.ndarray:
    """Return each example's part of the score of an order, `[examples]`."""
    if problem == "single_label_classification":
        counts = given.sum(0)
        weights = given / np.maximum(counts, 1) / max((counts > 0).sum(), 1)
    else:
        varied = max((given.std(0) > 0).sum(), 1)
        weights, answers = _units(given) / varied, _units(answers)
    return (weights * answers[:, order]).sum(1)


def _skill(
    given: np.ndarray, answers: np.ndarray, order: np.ndarray, problem: ProblemType
) -> tuple[float, float]:
    """Return the score of an order, and its distance from chance in standard deviations."""
    score = float(_each(given, answers, order, problem).sum())
    if len(given) < 2:
        return score, 0.0
    if problem != "single_label_classification":
        return score, score * math.sqrt(len(given))
    counts = given.sum(0)
    weights = given / np.maximum(counts, 1) / max((counts > 0).sum(), 1)
    # The moments of a sum over pairs under all permutations (Hoeffding 1951).
    table = weights @ answers[:, order].T
    mean = table.sum() / len(table)
    table = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    deviation = math.sqrt((table**2).sum() / (len(table) - 1))
    return score, float((score - mean) / deviation) if deviation > 1e-9 else 0.0


def _best(given: np.ndarray, answers: np.ndarray, problem: ProblemType) -> np.ndarray:
    """Return the output of each label that together make the highest score."""
    if problem == "single_label_classification":
        table = given.T @ answers / np.maximum(given.sum(0), 1)[:, None]
    else:
        table = _units(given).T @ _units(answers)
    # Where nothing tells, labels stay where they are.
    return linear_sum_assignment(table + 1e-6 * np.eye(len(table)), maximize=True)[1]
