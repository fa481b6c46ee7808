"""Arguments of a distillation run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

__all__ = ["DistillationConfig"]


@dataclass
class DistillationConfig(TrainingArguments):
    """`TrainingArguments` plus what distillation needs.

    Attributes:
        temperature: T > 0 that softens both models' outputs. 2 by default.
        alpha: Weight in [0, 1] of the distillation loss; the labels' loss gets the rest. With 1 the
            training data need no labels.
        allow_untrained_teacher: Accept a teacher with a fresh head or at chance level.

    Raises:
        ValueError: If a value is out of its range.
    """

    temperature: float = field(
        default=2.0, metadata={"help": "Softens the outputs of teacher and student; above 0."}
    )
    alpha: float = field(
        default=0.5,
        metadata={"help": "Weight of the distillation loss, 0 to 1; the labels get the rest."},
    )
    allow_untrained_teacher: bool = field(
        default=False,
        metadata={"help": "Accept a teacher with a fresh head or at chance level."},
    )

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature is {self.temperature}; expected a number above 0, usually 1 to 10."
            )
        if not 0 <= self.alpha <= 1:
            raise ValueError(
                f"alpha is {self.alpha}; expected 0 (labels only) to 1 (teacher only)."
            )
        super().__post_init__()
