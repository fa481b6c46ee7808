"""How much of a training's time its teachers take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
        self._seconds = 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []

    def start(self) -> None:
        """Begin to count, unless that is so already."""
        if self._began is None:
            self._began = time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block as the teachers'."""
        if self._device.type == "cpu":
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        first, last = (torch.Event(self._device, enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((first, last))

    def take(self) -> float:
        """Return the share, from 0 to 1, and begin anew."""
        for first, last in self._events:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
        whole = time.perf_counter() - (self._began or 0.0)
        share = self._seconds / whole if self._began is not None else 0.0
        self._began, self._seconds, self._events = None, 0.0, []
        return min(share, 1.0)
