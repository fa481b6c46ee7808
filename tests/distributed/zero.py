"""Distil with a hidden-state loss and cut, under DeepSpeed's ZeRO; write what comes out.

Stage 0 is without DeepSpeed, stage 2 prunes in training, stage 3 distils and cuts the saved model.

Usage, under torchrun or alone: zero.py FOLDER STAGE
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from models import tiny
from transformers import AutoModelForSequenceClassification, set_seed

import hfslim
from hfslim import DistillationConfig, DistillationTrainer, PruningCallback
from hfslim.anatomy import example_inputs

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


def train(folder: Path, stage: int, prunes: bool) -> None:
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
    callbacks = [PruningCallback(TARGET, end=0.8, interval=2)] if prunes else []
    trainer = DistillationTrainer(
        student, arguments, teacher=teacher, train_dataset=data, callbacks=callbacks
    )
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    trainer.accelerator.wait_for_everyone()


def cut(folder: Path) -> None:
    """Cut what was saved, and save that."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "saved")
    batch = example_inputs(model, batch_size=6, length=8)
    hfslim.prune(model, [batch], TARGET, progress=False, reconstruction="none")
    model.save_pretrained(folder / "cut")


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, stage = Path(sys.argv[1]), int(sys.argv[2])
    train(target, stage, prunes=stage == 2)
    if stage == 3:
        # The arguments of before are still there, so that the models are built in parts.
        refused = ""
        try:
            train(target / "refused", stage, prunes=False)
        except ValueError as error:
            refused = str(error)
        if int(os.environ.get("RANK", "0")) == 0:
            (target / "refused.txt").write_text(refused)
    torch.distributed.destroy_process_group()
