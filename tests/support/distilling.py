"""A tiny student and teacher, and the arguments to distil with."""

from pathlib import Path

import torch
from transformers import (
    PreTrainedModel,
)

from hfslim import DistillationConfig
from hfslim.anatomy.inputs import example_inputs

Data = list[dict[str, torch.Tensor]]


def examples(model: PreTrainedModel, count: int = 12, labels: bool = True) -> Data:
    length = 1600 if model.main_input_name == "input_values" else 12
    length = length if model.main_input_name.startswith("input") else None
    inputs = example_inputs(model, batch_size=count, length=length)
    rows = [{name: value[i] for name, value in inputs.items()} for i in range(count)]
    if labels:
        for i, row in enumerate(rows):
            row["labels"] = torch.tensor(i % model.config.num_labels)
    return rows


def config(folder: Path, **kwargs: object) -> DistillationConfig:
    settings = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        "allow_untrained_teacher": True,
    }
    return DistillationConfig(output_dir=str(folder), **{**settings, **kwargs})


def rename(model: PreTrainedModel, *names: str) -> PreTrainedModel:
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    return model


def str_folder(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder / "teacher")
    return str(folder / "teacher")
