"""Prune in training on two processes, whole and resumed; write what each process ends with.

The layers that LayerDrop skips in each step are written too.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from models import tiny
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from hfslim import LayerDropCallback, PruningCallback, SlimTrainer


def train(
    folder: Path, callback: TrainerCallback, checkpoint: Path | None = None
) -> PreTrainedModel:
    set_seed(0)
    texts = torch.randint(64, (64, 12), generator=torch.Generator().manual_seed(0))
    trainer = SlimTrainer(
        model=tiny("bert"),
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            max_steps=12,
            learning_rate=1e-3,
            save_strategy="steps",
            save_steps=4,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(
            {"input_ids": texts.tolist(), "labels": (texts[:, 0] % 3).tolist()}
        ),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer.model


def prune(folder: Path, criterion: str, checkpoint: Path | None = None) -> dict[str, Any]:
    callback = PruningCallback({"macs": 0.6}, criterion=criterion, end=0.75)
    weights = train(folder, callback, checkpoint).state_dict()
    assert callback.structure is not None
    return {"structure": callback.structure.to_dict(), "weights": weights}


class Skipped(LayerDropCallback):
    """Notes the layers that each step skips."""

    def __init__(self) -> None:
        super().__init__(p=0.5)
        self.layers: list[list[int]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_step_begin(*args, **kwargs)
        [closed] = self._gates.closed.values()
        self.layers.append(sorted(closed))
        torch.rand(1 + torch.distributed.get_rank())  # processes' own generators differ


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    found: dict[str, Any] = {}
    for criterion in sys.argv[2:]:
        run = target / criterion
        found[f"{criterion} whole"] = prune(run, criterion)
        found[f"{criterion} resumed"] = prune(target / "again", criterion, run / "checkpoint-4")
    skipped = Skipped()
    train(target / "layerdrop", skipped)
    found["layerdrop"] = skipped.layers
    torch.save(found, target / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
