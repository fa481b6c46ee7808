"""Distil with a hidden-state loss, under DeepSpeed's ZeRO; write what comes out.

Stage 0 is without DeepSpeed. WHAT is done on the way: `prune`, `layerdrop`, else nothing. `parts`
comes after another one whose arguments are still there, so that its models are built in parts.
Where FOLDER/WHAT holds checkpoints, training resumes from the last whole one.

Usage, under torchrun: zero.py FOLDER STAGE WHAT …
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from models import tiny
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification, TrainerCallback, TrainerState, set_seed

import hfslim
from hfslim import (
    DistillationConfig,
    DistillationTrainer,
    LayerDropCallback,
    PruningCallback,
)
from hfslim.anatomy.inputs import example_inputs
from hfslim.training.parallel import forget_trainers

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TARGET = {"macs": 0.6}


def settings(stage: int) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


class Began(TrainerCallback):
    """Tells the step that a training begins at."""

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        print(f"began at step {state.global_step}")


def train(folder: Path, stage: int, what: str) -> None:
    set_seed(0)
    texts = torch.randint(64, (21, 8), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": texts.tolist(), "labels": (texts[:, 0] % 3).tolist()})
    # Built before the arguments, that is whole: transformers would build them in ZeRO-3's parts.
    student, teacher = tiny("bert", **CALM), tiny("bert", seed=1, **CALM)
    arguments = DistillationConfig(
        output_dir=str(folder),
        per_device_train_batch_size=8 // WORLD,
        max_steps=6,
        optim="sgd",
        learning_rate=0.05,
        feature_losses={"hidden_mse": 0.5},
        save_strategy="steps",
        save_steps=3,
        allow_untrained_teacher=True,
        use_cpu=True,
        disable_tqdm=True,
        deepspeed=settings(stage) if stage else None,
    )
    callbacks: dict[str, Callable[[], TrainerCallback]] = {
        "prune": lambda: PruningCallback(TARGET, end=0.8, interval=2),
        "layerdrop": lambda: LayerDropCallback(p=0.5),
    }
    trainer = DistillationTrainer(
        student,
        arguments,
        teacher=teacher,
        train_dataset=data,
        callbacks=[Began(), *([callbacks[what]()] if what in callbacks else [])],
    )
    split = all(isinstance(parameter, DTensor) for parameter in trainer.teacher.parameters())
    print(f"the teacher is {'split' if split else 'whole'}")
    trainer.train(resume_from_checkpoint=(folder / "checkpoint-3").exists())
    trainer.save_model(str(folder / "saved"))
    trainer.accelerator.wait_for_everyone()


def cut(folder: Path) -> None:
    """Cut what a training saved, and save that."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "saved")
    batch = example_inputs(model, batch_size=6, length=8)
    hfslim.prune(model, [batch], TARGET, progress=False, reconstruction="none")
    model.save_pretrained(folder / "cut")


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, stage = Path(sys.argv[1]), int(sys.argv[2])
    refused = {}
    for what in sys.argv[3:]:
        if what != "parts":
            forget_trainers()
        try:
            train(target / what, stage, what)
        except ValueError as error:
            refused[what] = str(error)
    if int(os.environ.get("RANK", "0")) == 0:
        (target / "refused.json").write_text(json.dumps(refused))
    torch.distributed.destroy_process_group()
