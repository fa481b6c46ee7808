"""Prune and distil by every criterion on any number of processes; write what each one ends with.

Usage, under torchrun or alone: one_answer.py FOLDER.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from models import tiny
from transformers import TrainerCallback, set_seed

import hfslim
from hfslim import DistillationConfig, DistillationTrainer, PruningCallback
from hfslim.anatomy.inputs import example_inputs
from hfslim.pruning.scores.criteria import CRITERIA

CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXAMPLES = 21
SHARES = {1: (EXAMPLES,), 2: (EXAMPLES, 0), 4: (11, 0, 7, 3)}
"""Calibration examples of each process: uneven, and none at all."""
RANK, WORLD = (
    int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
)


def kinds_of(criterion: str) -> list[str]:
    kinds = [kind for kind in CRITERIA[criterion].kinds if kind in ("heads", "neurons", "layers")]
    return [kind for kind in kinds if kind != "layers"] or kinds


def calibrated(criterion: str) -> dict[str, Any]:
    """Prune from calibration data, of which this process has its share."""
    model = tiny("bert")
    batch = example_inputs(model, batch_size=EXAMPLES, length=8)
    batch["labels"] = torch.arange(EXAMPLES) % 3
    start = sum(SHARES[WORLD][:RANK])
    share = slice(start, start + SHARES[WORLD][RANK])
    data = [{k: v[share] for k, v in batch.items()}] if SHARES[WORLD][RANK] else []
    kinds = kinds_of(criterion)
    target = {"sparsity": 0.34} if kinds == ["layers"] else {"macs": 0.6}
    # What weights make up for is compared in test_scores.py, to what float32 sums allow.
    result = hfslim.prune(
        model, data, target, kinds, criterion, progress=False, reconstruction="none"
    )
    return {"structure": result.structure.digest(), "weights": model.state_dict(), "losses": []}


class _Losses(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
        names = ("loss", "loss_hard", "loss_distillation", "loss_hidden_mse", "eval_loss")
        self.seen += [float(logs[name]) for name in names if name in logs]


def trained(criterion: str, folder: Path) -> dict[str, Any]:
    """Distil with a hidden-state loss while units go; 21 examples do not divide into batches."""
    set_seed(0)
    texts = torch.randint(64, (EXAMPLES, 8), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": texts.tolist(), "labels": (texts[:, 0] % 3).tolist()})
    kinds = kinds_of(criterion)
    callback = PruningCallback(
        {"sparsity": 0.34} if kinds == ["layers"] else {"macs": 0.6},
        kinds,
        criterion,
        end=0.8,
        interval=3 if criterion != "l0" else None,
    )
    losses = _Losses()
    trainer = DistillationTrainer(
        model=tiny("bert", **CALM),
        args=DistillationConfig(
            output_dir=str(folder),
            per_device_train_batch_size=8 // WORLD,
            per_device_eval_batch_size=8 // WORLD,
            max_steps=8,
            # Adam would blow the rounding of gradients that should be zero up to whole steps.
            optim="sgd",
            learning_rate=0.05,
            feature_losses={"hidden_mse": 0.5},
            hidden_projection=True,
            layer_map="dynamic",
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=4,
            save_strategy="no",
            allow_untrained_teacher=True,
            use_cpu=True,
            disable_tqdm=True,
        ),
        teacher=tiny("bert", seed=1, hidden_size=48, **CALM),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[callback, losses],
    )
    trainer.train()
    assert callback.structure is not None
    digest = callback.structure.digest()
    return {"structure": digest, "weights": trainer.model.state_dict(), "losses": losses.seen}


def run(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name, entry in CRITERIA.items():
        if "calibration" in entry.when:
            found[f"{name}, calibration"] = calibrated(name)
        if "training" in entry.when:
            found[f"{name}, training"] = trained(name, folder)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    if WORLD > 1:
        torch.distributed.init_process_group("gloo")
    target = Path(sys.argv[1])
    torch.save(run(target / "runs"), target / f"{RANK}.pt")
    if WORLD > 1:
        torch.distributed.destroy_process_group()
