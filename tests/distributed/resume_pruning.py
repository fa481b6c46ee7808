"""Prune in training on two processes, whole and resumed; write what each process ends with."""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from models import tiny
from transformers import TrainingArguments, set_seed

from hfslim import PruningCallback, SlimTrainer


def train(folder: Path, criterion: str, checkpoint: Path | None = None) -> dict:
    set_seed(0)
    texts = torch.randint(64, (64, 12), generator=torch.Generator().manual_seed(0))
    callback = PruningCallback({"macs": 0.6}, criterion=criterion, end=0.75)
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
    assert callback.structure is not None
    return {"structure": callback.structure.to_dict(), "weights": trainer.model.state_dict()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    found = {}
    for criterion in sys.argv[2:]:
        run = target / criterion
        found[f"{criterion} whole"] = train(run, criterion)
        found[f"{criterion} resumed"] = train(target / "again", criterion, run / "checkpoint-4")
    torch.save(found, target / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
