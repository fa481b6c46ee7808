"""What several tests share: cached losses."""

from pathlib import Path

from distilling import config, examples
from models import tiny
from transformers import set_seed

from hfslim import DistillationTrainer

Losses = list[float]


def losses(folder: Path, cache: Path | None, family: str = "bert", **settings: object) -> Losses:
    """Train with dropout and shuffling, and return the distillation loss of each step."""
    set_seed(0)
    resume = settings.pop("resume", None)
    student = tiny(family)
    trainer = DistillationTrainer(
        student,
        config(
            folder,
            teacher_cache=cache and str(cache),
            **{
                "logging_steps": 1,
                "max_steps": 8,
                "save_steps": 4,
                "gradient_accumulation_steps": 2,
                **settings,
            },
        ),
        teacher=tiny(family, seed=1),
        train_dataset=examples(student, count=18),
        eval_dataset=examples(student, count=4),
    )
    trainer.train(resume_from_checkpoint=resume)
    assert "eval_loss" in trainer.evaluate()
    log = [entry for entry in trainer.state.log_history if "loss_distillation" in entry]
    if cache:
        assert {entry["teacher_cache_hits"] for entry in log} == {1.0}
    return [entry["loss_distillation"] for entry in log]
