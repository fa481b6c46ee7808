"""Writes the gradients of one optimizer step, per head type and layout of its 16 examples.

Usage: gradients.py FILE BATCH ACCUMULATION; with torchrun the batch is each process's.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from models import tiny

from hfslim.anatomy.inputs import example_inputs
from hfslim.distillation import DistillationConfig, DistillationTrainer
from hfslim.distillation.losses.feature_losses import FEATURE_LOSSES
from hfslim.training.checkpoint import SlimTrainer

HEADS = {
    "bert-single": ("bert", 3),
    "bert-multi": ("bert", 3),
    "bert-regression": ("bert", 1),
    "bert-partly-labelled": ("bert", 3),
    "vit-single": ("vit", 3),
    "vit-multi": ("vit", 3),
    "vit-regression": ("vit", 1),
    "wav2vec2-single": ("wav2vec2", 3),
    "wav2vec2-multi": ("wav2vec2", 3),
    "wav2vec2-regression": ("wav2vec2", 1),
    "whisper-single": ("whisper", 3),
    "whisper-multi": ("whisper", 3),
    "whisper-regression": ("whisper", 1),
}


FEATURES = dict.fromkeys(FEATURE_LOSSES, 1.0)


class Capture(TrainerCallback):
    """Keeps the gradients of the first optimizer step, before any clipping."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if not self.gradients:
            self.gradients = [
                parameter.grad.flatten().clone()
                for parameter in model.parameters()
                if parameter.grad is not None
            ]


def examples(head: str, model: PreTrainedModel, count: int) -> list[dict[str, Tensor]]:
    inputs = example_inputs(model, batch_size=count, seed=1, length=_length(model))
    index = torch.arange(count)
    if head.endswith("multi"):
        labels = ((index[:, None] + torch.arange(3)) % 2).float()
    elif head.endswith("regression"):
        labels = index / 8 - 1
    else:
        labels = index % 3
    if head.endswith("partly-labelled"):
        labels[[0, 1, 2, 9]] = -100
    return [{**{k: v[i] for k, v in inputs.items()}, "labels": labels[i]} for i in range(count)]


def _length(model: PreTrainedModel) -> int | None:
    return {"input_ids": 12, "input_values": 1600}.get(model.main_input_name)


def gradient(
    head: str, distil: bool, batch: int, accumulation: int, folder: str, count: int = 16
) -> tuple[Tensor, dict[str, float]]:
    """Train one step on `count` examples, and return its gradient and what it logged."""
    family, outputs = HEADS[head]
    model, teacher = (
        tiny(family, num_labels=outputs, seed=seed, attention_dropout=0.0).eval() for seed in (0, 1)
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    capture = Capture()
    data = examples(head, model, count)
    if distil:
        features = FEATURES if head in ("bert-single", "wav2vec2-single") else {}
        arguments = DistillationConfig(
            **settings, alpha=0.7, feature_losses=features, allow_untrained_teacher=True
        )
        trainer = DistillationTrainer(
            model, arguments, teacher=teacher, train_dataset=data, callbacks=[capture]
        )
    else:
        arguments = TrainingArguments(**settings)
        trainer = SlimTrainer(model, arguments, train_dataset=data, callbacks=[capture])
    trainer.train()
    return torch.cat(capture.gradients), trainer.state.log_history[0]


def main(target: str, batch: str, accumulation: str) -> None:
    results = {
        (head, distil): gradient(head, distil, int(batch), int(accumulation), target + ".run")
        for head in HEADS
        for distil in (False, True)
    }
    if torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
        torch.save(results, f"{target}.{rank}")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
