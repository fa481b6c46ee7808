"""Schedules of gradual pruning: the progress towards the target, and the decisions' steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Schedule = Literal["cubic", "linear", "oneshot", "iterative"]


def cubic(progress: float) -> float:
    """Remove most units early, while there is time to recover: `1 − (1 − p)³`.

    (Zhu and Gupta 2017, arXiv 1710.01878.)

    Examples:
        >>> cubic(0.5)
        0.875
    """
    return 1 - (1 - progress) ** 3


def linear(progress: float) -> float:
    """Remove evenly."""
    return progress


def oneshot(progress: float) -> float:
    """Remove everything at the end of the window, by the scores of the whole window."""
    return float(progress >= 1)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cubic": cubic,
    "linear": linear,
    "oneshot": oneshot,
    "iterative": linear,
}
DECISIONS = {"cubic": 20, "linear": 20, "oneshot": 1, "iterative": 4}
"""Number of decisions if no interval is given."""
GRADUAL = ("cubic", "linear")


@dataclass(frozen=True)
class Pace:
    """The schedule of a callback's decisions, as fractions of a training.

    Attributes:
        schedule: A name of `SCHEDULES`.
        start: When pruning begins.
        end: When the goal is met.
        interval: Optimizer steps between decisions; None for the number in `DECISIONS`.
    """

    schedule: Schedule
    start: float
    end: float
    interval: int | None

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {list(SCHEDULES)}, got {self.schedule!r}")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"start and end must be 0 <= start < end <= 1, got {self.start} and {self.end}"
            )
        if self.interval is not None and self.interval < 1:
            raise ValueError(f"interval is a number of steps, at least 1; got {self.interval}")

    def check_learned(self) -> None:
        """Raise a ValueError if the schedule is not gradual enough for learned gates."""
        if self.schedule not in GRADUAL or self.interval is not None:
            raise ValueError(
                "learned gates close gradually, without decisions on the way: with criterion='l0' "
                f"the schedule is one of {list(GRADUAL)} and there is no interval; got "
                f"schedule={self.schedule!r}, interval={self.interval}"
            )

    def over(self, steps: int) -> Decisions:
        """Return the decisions of a training of a given number of optimizer steps."""
        first, last = math.ceil(self.start * steps), math.ceil(self.end * steps)
        last = max(last, first + 1)
        interval = self.interval or max(1, (last - first) // DECISIONS[self.schedule])
        return Decisions(SCHEDULES[self.schedule], first, last, interval)


@dataclass(frozen=True)
class Decisions:
    """The optimizer steps of a training after which a callback decides.

    Attributes:
        schedule: From the fraction of the time that has passed to the progress.
        first: Steps before pruning begins.
        last: The step of the last decision.
        interval: Steps between decisions.
    """

    schedule: Callable[[float], float]
    first: int
    last: int
    interval: int

    @property
    def steps(self) -> int:
        """Number of steps from first to last."""
        return self.last - self.first

    def after(self, step: int) -> float | None:
        """Return the progress to decide after a step, in [0, 1]; None without a decision.

        Examples:
            >>> decisions = Pace("linear", 0.2, 0.6, 2).over(10)
            >>> [decisions.after(step) for step in range(8)]
            [None, None, None, None, 0.5, None, 1.0, None]
        """
        due = step == self.last or (step - self.first) % self.interval == 0
        return self.progress(step) if self.first < step <= self.last and due else None

    def progress(self, step: int, within: float = 1.0) -> float:
        """Return the progress towards the goal at a step, which it reaches `within` of the time."""
        return self.schedule(min(1.0, (step - self.first) / (within * self.steps)))
