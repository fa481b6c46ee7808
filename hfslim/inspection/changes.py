"""Compare the predictions of two models, example by example and class by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import softmax

Outcome = Literal["lost", "gained", "other"]
"""Right before and wrong now; wrong before and right now; two different wrong classes."""


@dataclass(frozen=True)
class Change:
    """An example whose prediction changed.

    Attributes:
        example: Its number among the evaluation examples.
        outcome: The kind of change.
        label: The right class.
        before: The class that the first model predicts.
        after: The class that the second model predicts.
        confidence_before: The first model's probability of `before`.
        confidence_after: The second model's probability of `after`.
    """

    example: int
    outcome: Outcome
    label: str
    before: str
    after: str
    confidence_before: float
    confidence_after: float


@dataclass(frozen=True)
class ClassChange:
    """The numbers of examples of one class.

    Attributes:
        name: The class.
        examples: All its examples.
        right_before: Examples that the first model classifies correctly.
        right_after: Examples that the second model classifies correctly.
        lost: Examples of the outcome `lost`.
        gained: Examples of the outcome `gained`.
        other: Examples of the outcome `other`.
    """

    name: str
    examples: int
    right_before: int
    right_after: int
    lost: int
    gained: int
    other: int


@dataclass(frozen=True)
class Changes:
    """The difference between the predictions of two models.

    Attributes:
        examples: Number of examples.
        changes: The changes: lost, gained, other; each by falling confidence of the second model.
        classes: The counts by class.
    """

    examples: int
    changes: tuple[Change, ...]
    classes: tuple[ClassChange, ...]


def prediction_changes(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> Changes:
    """Find the examples whose prediction changed between two models.

    Args:
        before: Logits of the first model, such as the teacher, `[examples, classes]`.
        after: Logits of the second model, classes in the same order.
        labels: Right classes, integers `[examples]`.
        names: Names of the classes.

    Raises:
        ValueError: The shapes differ, or the examples have no single class.

    Examples:
        >>> before, after = np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[0.0, 3.0], [0.0, 4.0]])
        >>> changes = prediction_changes(before, after, np.array([0, 1]), ["cat", "dog"])
        >>> [(c.example, c.outcome, c.after, round(c.confidence_after, 2)) for c in changes.changes]
        [(0, 'lost', 'dog', 0.95)]
    """
    shape = (len(labels), len(names))
    if labels.ndim != 1 or before.shape != shape or after.shape != shape:
        raise ValueError(
            "changes need logits [examples, classes] of two models and one class per example; got "
            f"{before.shape}, {after.shape}, labels {labels.shape} and {len(names)} names"
        )
    predicted = [logits.argmax(-1) for logits in (before, after)]
    confidence = [softmax(logits, -1).max(-1) for logits in (before, after)]
    right = [one == labels for one in predicted]
    outcomes: dict[Outcome, np.ndarray] = {
        "lost": right[0] & ~right[1],
        "gained": ~right[0] & right[1],
        "other": ~right[0] & ~right[1] & (predicted[0] != predicted[1]),
    }
    changes = [
        Change(
            int(i),
            outcome,
            names[labels[i]],
            *(names[one[i]] for one in predicted),
            *(float(one[i]) for one in confidence),
        )
        for outcome, rows in outcomes.items()
        for i in sorted(rows.nonzero()[0], key=lambda i: -confidence[1][i])
    ]
    members = [labels == number for number in range(len(names))]
    classes = [
        ClassChange(
            name,
            int(own.sum()),
            *(int((own & one).sum()) for one in right),
            **{outcome: int((own & rows).sum()) for outcome, rows in outcomes.items()},
        )
        for name, own in zip(names, members, strict=True)
    ]
    return Changes(len(labels), tuple(changes), tuple(classes))
