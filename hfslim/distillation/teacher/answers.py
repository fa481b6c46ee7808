"""The teachers' answers to the batches of a training, and the time that they take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hfslim.distillation.losses.capture import CapturedStates
from hfslim.distillation.losses.feature_terms import FeatureTerms
from hfslim.distillation.teacher.teachers import Teachers
from hfslim.measuring.timing import Mark, mark, seconds_between

__all__ = ["TeacherAnswer", "TeacherAnswers"]


@dataclass(frozen=True)
class TeacherAnswer:
    """The teachers' outputs on one batch.

    Attributes:
        logits: `[batch, classes]` float32, in the student's class order.
        states: The teacher's states that the feature losses compare; None without such losses.
        cached: Whether the outputs come from a cache; None if there is no cache.
    """

    logits: Tensor
    states: CapturedStates | None = None
    cached: bool | None = None


class TeacherClock:
    """Measures the time inside `running` blocks as a share of all time since `start`.

    On an accelerator it marks the stream, and waits for the marks only in `take`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began: float | None = None
        self._spans: list[tuple[Mark, Mark]] = []

    def start(self) -> None:
        """Start to count, unless it has started."""
        if self._began is None:
            self._began = time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block."""
        start = mark(self._device)
        yield
        self._spans.append((start, mark(self._device)))

    def take(self) -> float:
        """Return the share, from 0 to 1, and reset."""
        seconds = sum(seconds_between(*span) for span in self._spans)
        whole = time.perf_counter() - (self._began or 0.0)
        share = seconds / whole if self._began is not None else 0.0
        self._began, self._spans = None, []
        return min(share, 1.0)


class TeacherAnswers:
    """Runs the teachers on each batch, and measures their time."""

    def __init__(self, teachers: Teachers, accelerator: Accelerator) -> None:
        self.teachers, self.accelerator = teachers, accelerator
        self.clock = TeacherClock(accelerator.device)

    def of(
        self,
        batch: dict[str, Any],
        terms: FeatureTerms | None = None,
        student: CapturedStates | None = None,
    ) -> TeacherAnswer:
        """Return the answer to a batch.

        Args:
            batch: The inputs of student and teachers.
            terms: The feature losses, if there are any.
            student: The student's states on the batch, with `terms`.
        """
        with self.clock.running(), self.accelerator.autocast():
            if terms is None:
                return TeacherAnswer(self.teachers.logits(batch))
            capture = terms.captures[1]
            with capture.recording() as states:
                return TeacherAnswer(self.teachers.logits(batch, **capture.arguments), states)
