"""Train a student on the outputs of a teacher."""

from hfslim.distillation.config import DistillationConfig
from hfslim.distillation.losses import register_loss
from hfslim.distillation.losses.feature_losses import FeatureLoss
from hfslim.distillation.losses.logit_losses import LogitLoss
from hfslim.distillation.student import init_from_teacher
from hfslim.distillation.trainer import DistillationTrainer
from hfslim.tasks.pairing import PairedCollator, teacher_inputs

__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "FeatureLoss",
    "LogitLoss",
    "PairedCollator",
    "init_from_teacher",
    "register_loss",
    "teacher_inputs",
]
