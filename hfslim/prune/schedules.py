"""How far towards its target a gradual pruning is, as training goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Schedule = Literal["cubic", "linear", "oneshot"]


def cubic(progress: float) -> float:
    """Remove most early, while there is time to recover: `1 − (1 − p)³`.

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
    """Remove everything at the end of the window, from the scores of all of it."""
    return float(progress >= 1)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cubic": cubic,
    "linear": linear,
    "oneshot": oneshot,
}
