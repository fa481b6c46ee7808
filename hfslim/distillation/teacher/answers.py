"""The teachers' answers to the batches of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from hfslim.distillation.losses.capture import CapturedStates
from hfslim.distillation.losses.feature_terms import FeatureTerms
from hfslim.distillation.teacher.clock import TeacherClock
from hfslim.distillation.teacher.teachers import Teachers

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


class TeacherAnswers:
    """Runs the teachers on each batch, and measures their time.

    Args:
        teachers: The teachers.
        accelerator: Of the training.
    """

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
