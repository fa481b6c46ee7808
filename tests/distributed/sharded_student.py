"""Distil features into a student that is whole, and into one that fully_shard has split.

The Trainer is told that the student was split when it was loaded, which it leaves as it is.

Usage, under torchrun: sharded_student.py FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from models import tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import set_seed
from transformers.distributed import DistributedConfig

from hfslim import DistillationConfig, DistillationTrainer

CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "hidden": {"feature_losses": {"hidden_mse": 0.5, "minilm_v2": 0.5}},
    "attention": {"feature_losses": {"attention": 1e3, "minilm": 1.0}},
    "dynamic, accumulated": {
        "feature_losses": {"hidden_cosine": 1.0},
        "layer_map": "dynamic",
        "gradient_accumulation_steps": 2,
    },
    "projection": {"feature_losses": {"hidden_mse": 0.5}, "hidden_projection": True},
}


def train(folder: Path, case: str, shard: bool) -> dict[str, Any]:
    """Distil for three steps; return their losses and the student's weights."""
    set_seed(0)
    texts = torch.randint(64, (32, 8), generator=torch.Generator().manual_seed(0))
    masks = [[1] * (4 + i % 5) + [0] * (4 - i % 5) for i in range(32)]
    columns = {"input_ids": texts.tolist(), "attention_mask": masks, "labels": texts[:, 0] % 3}
    width = {"hidden_size": 16, "intermediate_size": 32} if case == "projection" else {}
    student = tiny("bert", **width, **CALM)
    if shard:
        mesh = init_device_mesh("cpu", (2,))
        for layer in student.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(student, mesh=mesh)
        student.config.distributed_config = DistributedConfig(fsdp_size=2)
        type(student).is_distributed_loading_by_transformers = True
    arguments = DistillationConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        allow_untrained_teacher=True,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        **CASES[case],
    )
    trainer = DistillationTrainer(
        student,
        arguments,
        teacher=tiny("bert", seed=1, num_hidden_layers=6, **CALM),
        train_dataset=Dataset.from_dict(columns),
    )
    trainer.train()
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in student.named_parameters()
    }
    names = [name for name in trainer.state.log_history[0] if "loss" in name or "norm" in name]
    losses = [[entry[name] for name in names] for entry in trainer.state.log_history[:-1]]
    return {"losses": losses, "weights": weights}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    found = {case: {shard: train(target, case, shard) for shard in (False, True)} for case in CASES}
    torch.save(found, target / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
