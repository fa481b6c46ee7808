"""What several tests share: trainings."""

from pathlib import Path

import torch
from models import tiny
from transformers import PreTrainedModel, TrainingArguments, set_seed

from hfslim.anatomy.inputs import example_inputs


def examples(model: PreTrainedModel, count: int = 12) -> list[dict[str, torch.Tensor]]:
    inputs = example_inputs(model, batch_size=count)
    labels = torch.arange(count) % model.config.num_labels
    return [{**{k: v[i] for k, v in inputs.items()}, "labels": labels[i]} for i in range(count)]


def arguments(folder: Path, **kwargs: object) -> TrainingArguments:
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "logging_strategy": "no",
        "use_cpu": True,
        "seed": 3,
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(folder), **{**settings, **kwargs})


def build(family: str) -> PreTrainedModel:
    set_seed(0)
    return tiny(family)


def difference(one: PreTrainedModel, other: PreTrainedModel) -> float:
    weights = other.state_dict()
    return max(
        (value.float() - weights[name].float()).abs().sum().item()
        for name, value in one.state_dict().items()
    )
