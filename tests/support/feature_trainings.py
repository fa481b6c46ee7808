"""What several tests share: feature trainings."""

from pathlib import Path

from distilling import config, examples
from transformers import (
    PreTrainedModel,
)

from hfslim import DistillationTrainer
from hfslim.distillation.losses.feature_terms import FeatureTerms


def trained(student: PreTrainedModel, teacher: PreTrainedModel, folder: Path, **settings: object):
    callbacks = settings.pop("callbacks", None)
    resume = settings.pop("resume", None)
    trainer = DistillationTrainer(
        student,
        config(folder, **settings),
        teacher=teacher,
        train_dataset=examples(student),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def terms(student: PreTrainedModel, teacher: PreTrainedModel, *names: str, **kwargs: object):
    settings = {"layer_map": "uniform", "projection": False, "relation_heads": None, **kwargs}
    return FeatureTerms(student, teacher, names, **settings)
