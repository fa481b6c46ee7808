"""Distil from a teacher that is whole, and from one that is split between the processes.

Usage, under torchrun: sharded_teacher.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from datasets import Dataset
from models import tiny
from torch.distributed.tensor import DTensor
from transformers import set_seed

from hfslim import DistillationConfig, DistillationTrainer
from hfslim.distillation.teacher.teacher import load_teacher

CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def train(folder: Path, shard: bool, **given: Any) -> dict[str, Any]:
    """Distil for four steps; return the losses and what share of the teacher is here."""
    set_seed(0)
    texts = torch.randint(64, (21, 8), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": texts.tolist(), "labels": (texts[:, 0] % 3).tolist()})
    arguments = DistillationConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-3,
        feature_losses={"hidden_mse": 0.5, "minilm_v2": 0.5},
        logging_steps=1,
        save_strategy="no",
        allow_untrained_teacher=True,
        use_cpu=True,
        disable_tqdm=True,
        **given,
    )
    teacher = tiny("bert", seed=1, **CALM)
    trainer = DistillationTrainer(
        tiny("bert", **CALM), arguments, teacher=teacher, train_dataset=data, eval_dataset=data
    )
    trainer.teachers.place(arguments.device, shard)
    trainer.train()
    whole = sum(p.numel() for p in teacher.parameters())
    here = sum(
        p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in teacher.parameters()
    )
    losses = [[v for k, v in log.items() if "loss" in k] for log in trainer.state.log_history]
    return {"losses": losses, "share": here / whole}


def loaded(folder: Path) -> dict[str, bool]:
    """Load a model with a new head as FSDP would, and as hfslim does; is the head here?"""
    first = torch.distributed.get_rank() == 0
    tiny("bert").base_model.save_pretrained(folder, is_main_process=first)
    torch.distributed.barrier()
    asks = {"accelerate_use_fsdp": "true", "fsdp_cpu_ram_efficient_loading": "true"}
    with patch_environment(**asks):
        stock = type(tiny("bert")).from_pretrained(folder)
        ours = load_teacher(folder, tiny("bert"), allow_untrained=True)
    heads = {"stock": stock.classifier.weight, "ours": ours.get_parameter("classifier.weight")}
    return {name: not head.is_meta for name, head in heads.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    found = {
        "whole": train(target, False),
        "split": train(target, True),
        "cached": train(
            target, True, teacher_cache=str(target / "cache"), teacher_cache_features=True
        ),
    }
    rank = torch.distributed.get_rank()
    found["loaded"] = loaded(target / "teacher")
    (target / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
