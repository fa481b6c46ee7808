"""Train a student on the outputs of a teacher."""

from hfslim.distill.config import DistillationConfig
from hfslim.distill.student import init_from_teacher
from hfslim.distill.trainer import DistillationTrainer
from hfslim.pairing import PairedCollator, teacher_inputs

__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "PairedCollator",
    "init_from_teacher",
    "teacher_inputs",
]
