"""Train a student on the outputs of a teacher."""

from hfslim.distillation.config import DistillationConfig
from hfslim.distillation.losses.feature_losses import register_feature_loss
from hfslim.distillation.losses.logit_losses import register_logit_loss
from hfslim.distillation.student import init_from_teacher
from hfslim.distillation.trainer import DistillationTrainer
from hfslim.tasks.pairing import PairedCollator, teacher_inputs

__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "PairedCollator",
    "init_from_teacher",
    "register_feature_loss",
    "register_logit_loss",
    "teacher_inputs",
]
