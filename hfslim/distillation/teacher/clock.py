"""How much of a training's time its teachers take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hfslim.measuring.timing import Mark, mark, seconds_between

__all__ = ["TeacherClock"]


class TeacherClock:
    """Measures the time inside `running` blocks as a share of all time since `start`.

    On an accelerator the work itself is timed, by events on its stream that nothing waits for until
    the share is asked for.

    Args:
        device: Where the teachers run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began: float | None = None
        self._spans: list[tuple[Mark, Mark]] = []

    def start(self) -> None:
        """Begin to count, unless that is so already."""
        if self._began is None:
            self._began = time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block as the teachers'."""
        start = mark(self._device)
        yield
        self._spans.append((start, mark(self._device)))

    def take(self) -> float:
        """Return the share, from 0 to 1, and begin anew."""
        seconds = sum(seconds_between(*span) for span in self._spans)
        whole = time.perf_counter() - (self._began or 0.0)
        share = seconds / whole if self._began is not None else 0.0
        self._began, self._spans = None, []
        return min(share, 1.0)
