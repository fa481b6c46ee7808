"""Writes the gradients of each term of a distillation alone, per layout of its 16 examples.

Usage, under torchrun: terms.py FILE, for 8 examples on each of two processes.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from models import tiny

from hfslim import L2SP, DistillationConfig, DistillationTrainer
from hfslim.anatomy.inputs import example_inputs
from hfslim.distillation.losses.feature_losses import FEATURE_LOSSES

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NARROW = {"hidden_size": 16, "intermediate_size": 32}
CASES: dict[str, dict[str, Any]] = {
    "kl": {},
    "dkd": {"logit_loss": "dkd"},
    "dkd, partly labelled": {"logit_loss": "dkd", "unlabelled": True},
    "dist": {"logit_loss": "dist"},
    "two teachers": {"teachers": 2},
    "l2_sp": {"alpha": 0.0, "l2_sp": True, "max_steps": 2},
    **{name: {"alpha": 0.0, "feature_losses": {name: 1e3}} for name in FEATURE_LOSSES},
    "projection": {
        "alpha": 0.0,
        "feature_losses": {"hidden_mse": 1.0},
        "hidden_projection": True,
        "narrow": True,
    },
    "dynamic map": {
        "alpha": 0.0,
        "feature_losses": {"hidden_mse": 1.0},
        "layer_map": "dynamic",
        "layers": 6,
        "max_steps": 2,
    },
}
LAYOUT_MATTERS = {"dist"}


class Keep(TrainerCallback):
    """Keeps the gradients of the last optimizer step, those of projections too."""

    trainer: DistillationTrainer

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        features = self.trainer.features.terms
        parameters = [*model.parameters(), *(features.projections.parameters() if features else ())]
        self.gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        self.pairs = features.pairs() if features else []


def rows(unlabelled: bool, count: int = 16) -> list[dict[str, Tensor]]:
    """Make examples of unequal length."""
    inputs = example_inputs(tiny("bert"), batch_size=count, seed=1, length=12)
    index = torch.arange(count)
    inputs["attention_mask"] = (torch.arange(12) < 4 + index[:, None] % 9).long()
    labels = index % 3
    if unlabelled:
        labels[[0, 1, 2, 9]] = -100
    return [{**{k: v[i] for k, v in inputs.items()}, "labels": labels[i]} for i in range(count)]


def gradient(
    case: str, batch: int, accumulation: int, folder: str
) -> tuple[Tensor, dict[str, float], list[tuple[int, int]]]:
    """Train on 16 examples a step; return the last step's gradient, its log and its layer map."""
    set_seed(0)
    given = dict(CASES[case])
    narrow = NARROW if given.pop("narrow", False) else {}
    layers = {"num_hidden_layers": given.pop("layers", 3)}
    teachers = [
        tiny("bert", seed=1 + i, **layers, **STILL) for i in range(given.pop("teachers", 1))
    ]
    keep = Keep()
    callbacks = [L2SP(0.5, head=0.2)] if given.pop("l2_sp", False) else []
    data = rows(given.pop("unlabelled", False))
    settings = DistillationConfig(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **{"alpha": 0.7, "max_steps": 1, **given},
        optim="sgd",
        learning_rate=1e-3,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        allow_untrained_teacher=True,
    )
    student = tiny("bert", **narrow, **STILL)
    keep.trainer = DistillationTrainer(
        student, settings, teacher=teachers, train_dataset=data, callbacks=[*callbacks, keep]
    )
    keep.trainer.train()
    return keep.gradient, keep.trainer.state.log_history[-2], keep.pairs


def main(target: str) -> None:
    results = {case: gradient(case, 8, 1, target + ".run") for case in CASES}
    torch.save(results, f"{target}.{torch.distributed.get_rank()}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
