"""What became of the predictions: the examples that two models decide differently, by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import softmax

Outcome = Literal["lost", "gained", "other"]
"""Right before and wrong now; wrong before and right now; wrong twice, in two ways."""


@dataclass(frozen=True)
class Change:
    """An example whose prediction changed.

    Attributes:
        example: Its number among the evaluation examples.
        outcome: Whether that was a loss.
        label: The right class.
        before: The class that the first model takes it for.
        after: The class that the second takes it for.
        confidence_before: Probability that the first gives to its class.
        confidence_after: Probability that the second gives to its class.
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
    """What changed for the examples of one class.

    Attributes:
        name: The class.
        examples: Number of its examples.
        right_before: Number that the first model gets right.
        right_after: Number that the second gets right.
        lost: Right before and wrong now.
        gained: Wrong before and right now.
        other: Wrong twice, in two ways.
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
    """How a model's predictions differ from those of another.

    Attributes:
        examples: Number of examples.
        changes: What was lost first, those first of which the second model is surest.
        classes: Class by class.
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
        after: Logits of the second, classes in the same order.
        labels: Right classes, integers `[examples]`.
        names: Names of the classes.

    Raises:
        ValueError: The shapes do not fit each other, or an example has no single class.

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
    said = [logits.argmax(-1) for logits in (before, after)]
    sure = [softmax(logits, -1).max(-1) for logits in (before, after)]
    right = [one == labels for one in said]
    outcomes: dict[Outcome, np.ndarray] = {
        "lost": right[0] & ~right[1],
        "gained": ~right[0] & right[1],
        "other": ~right[0] & ~right[1] & (said[0] != said[1]),
    }
    changes = [
        Change(
            int(i),
            outcome,
            names[labels[i]],
            names[said[0][i]],
            names[said[1][i]],
            float(sure[0][i]),
            float(sure[1][i]),
        )
        for outcome, rows in outcomes.items()
        for i in sorted(rows.nonzero()[0], key=lambda i: -sure[1][i])
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
