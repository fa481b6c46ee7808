"""What several tests share: augmented caches."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from distilling import config, examples
from models import tiny
from transformers import set_seed

from hfslim import DistillationTrainer
from hfslim.distillation.cache.examples import SeededExamples


def augmented(kind: str) -> Dataset:
    """Images that get brighter at random whenever they are read."""
    rows = examples(tiny("vit"), count=10)
    data = Dataset.from_dict(
        {"image": [r["pixel_values"].tolist() for r in rows], "labels": [i % 3 for i in range(10)]}
    )
    draw = {"torch": lambda: torch.rand(1), "numpy": np.random.rand, "python": random.random}[kind]

    def read(batch: dict[str, Any]) -> dict[str, Any]:
        images = [torch.tensor(image) + float(draw()) for image in batch["image"]]
        return {"pixel_values": images, "labels": batch["labels"]}

    return data.with_transform(read)


def trained(folder: Path, cache: Path | None, kind: str = "torch", **settings: Any) -> list[Any]:
    """Train for three epochs, of five steps in one process; return the log of each step."""
    set_seed(0)
    resume, live = settings.pop("resume", None), settings.pop("live_epochs", None)
    data = augmented(kind)
    student = tiny("vit", hidden_dropout_prob=0.1)
    trainer = DistillationTrainer(
        student,
        config(
            folder,
            teacher_cache=cache and str(cache),
            remove_unused_columns=False,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=3,
            logging_steps=1,
            **{"max_steps": 15, "save_strategy": "no", **settings},
        ),
        teacher=tiny("vit", seed=1),
        train_dataset=SeededExamples(data, 42, live) if live else data,
    )
    trainer.train(resume_from_checkpoint=resume)
    return [entry for entry in trainer.state.log_history if "loss_distillation" in entry]
