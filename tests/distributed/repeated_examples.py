"""Writes what a Trainer logs and evaluates on a stream, and the gradient of its last step.

Usage: repeated_examples.py FILE BATCH COUNT...
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from models import tiny

from hfslim.anatomy.inputs import example_inputs
from hfslim.training.checkpoint import SlimTrainer


class Stream(IterableDataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


class Sized(Stream):
    def __len__(self) -> int:
        return len(self.rows)


class Capture(TrainerCallback):
    """Keeps the gradients of the last optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.gradient = torch.cat(grads).clone()


def outcome(folder: str, kind: type[Stream], batch: int, count: int) -> dict[str, Any]:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, capture = tiny("bert", **still), Capture()
    inputs = example_inputs(model, count, seed=1, length=12)
    rows = [
        {**{k: v[i] for k, v in inputs.items()}, "labels": torch.tensor(i * i % 3)}
        for i in range(count)
    ]
    stream = kind(rows)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        max_steps=2,
        optim="sgd",
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        accelerator_config={"dispatch_batches": False},
    )
    trainer = SlimTrainer(
        model,
        arguments,
        train_dataset=stream,
        eval_dataset=stream,
        callbacks=[capture],
        compute_metrics=lambda p: {
            "accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())
        },
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figures = trainer.evaluate()
    return {
        "losses": losses,
        "gradient": capture.gradient,
        "accuracy": figures["eval_accuracy"],
    }


def main(target: str, batch: str, *counts: str) -> None:
    results = {
        (kind.__name__, int(count)): outcome(target + ".run", kind, int(batch), int(count))
        for kind in (Stream, Sized)
        for count in counts
    }
    if torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
        torch.save(results, f"{target}.{rank}")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
