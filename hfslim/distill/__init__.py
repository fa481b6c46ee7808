"""Train a student on the outputs of a teacher."""

from hfslim.distill.config import DistillationConfig
from hfslim.distill.trainer import DistillationTrainer
from hfslim.pairing import PairedCollator, teacher_inputs

__all__ = ["DistillationConfig", "DistillationTrainer", "PairedCollator", "teacher_inputs"]
