"""What several tests share: cached features."""

from pathlib import Path
from typing import Any

from distilling import config, examples
from models import tiny
from paired_teachers import tokenizer
from transformers import set_seed

from hfslim import DistillationTrainer

STILL = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0}


FEATURES = {"hidden_mse": 1.0, "hidden_l1_cosine": 0.5, "minilm_v2": 1.0}


def trained(folder: Path, cache: Path | None, **settings: Any) -> list[dict[str, float]]:
    """Train with dropout, shuffling and padding; return the log of each step."""
    set_seed(0)
    layers = settings.pop("layers", 3)
    labels = {"num_labels": settings.pop("classes", 6)}
    family = settings.pop("family", "bert")
    student = tiny(family, **labels, num_hidden_layers=layers, **STILL)
    data: list[Any] = examples(student, count=18)
    if family == "bert":  # Texts of unequal length, padded batch by batch.
        data = [{k: v.tolist() for k, v in row.items()} for row in data]
        for i, row in enumerate(data):
            row.update({k: v[: 4 + i % 9] for k, v in row.items() if k != "labels"})
    trainer = DistillationTrainer(
        student,
        config(
            folder,
            teacher_cache=cache and str(cache),
            logging_steps=1,
            save_strategy="no",
            gradient_accumulation_steps=2,
            **settings,
        ),
        teacher=tiny(family, seed=1, num_hidden_layers=3, **labels, **STILL),
        train_dataset=data,
        processing_class=tokenizer() if family == "bert" else None,
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss_distillation" in entry]
    if cache:
        assert {entry["teacher_cache_hits"] for entry in log} == {1.0}
    return log
