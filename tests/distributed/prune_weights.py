"""Prune weights in training, whole and resumed; write what each process ends with."""

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from models import tiny
from transformers import TrainingArguments, set_seed

from hfslim import PruningCallback, SlimTrainer, WeightPruningCallback

GOALS = {
    "magnitude": {"sparsity": 0.6},
    "movement": {"sparsity": 0.6, "method": "movement"},
    "2:4": {"pattern": "2:4", "start": 0.5, "end": 0.75},
}
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def train(folder: Path, name: str, checkpoint: Path | None = None) -> dict:
    set_seed(0)
    texts = torch.randint(64, (64, 12), generator=torch.Generator().manual_seed(0))
    callback = WeightPruningCallback(**GOALS[name])
    structure = PruningCallback({"sparsity": 0.4}, interval=2, end=0.5)
    trainer = SlimTrainer(
        model=tiny("bert", **CALM),
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
            max_steps=8,
            # Adam would blow the rounding of gradients that should be zero up to whole steps.
            optim="sgd",
            optim_args="momentum=0.9",
            learning_rate=0.05,
            save_strategy="steps",
            save_steps=3,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(
            {"input_ids": texts.tolist(), "labels": (texts[:, 0] % 3).tolist()}
        ),
        callbacks=[structure, callback] if name == "2:4" else [callback],
    )
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return {"zeros": callback.zeros, "weights": trainer.model.state_dict()}


def run(target: Path) -> dict:
    results = {}
    for name in GOALS:
        folder = target / name.replace(":", "-")
        results[name] = train(folder, name)
        again = train(target / "again", name, folder / "checkpoint-3")
        for key, value in results[name]["weights"].items():
            assert torch.equal(again["weights"][key], value), key
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    results = run(target)
    torch.save(results, target / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
