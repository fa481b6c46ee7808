"""Train a student on the outputs of a teacher."""

from hfslim.distill.config import DistillationConfig
from hfslim.distill.trainer import DistillationTrainer

__all__ = ["DistillationConfig", "DistillationTrainer"]
