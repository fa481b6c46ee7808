"""The benchmarks' tasks: a recipe each, and how much of its data recovery and scoring get."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
    default_data_collator,
)

from benchmarks.rivals.problem import Batch, Problem
from hfslim.distillation.teacher.teacher import accepted_inputs
from hfslim.measuring.timing import evaluating
from hfslim.pipeline import runner
from hfslim.pipeline.recipe import Recipe
from hfslim.pipeline.task_examples import TaskExamples, uses_cpu

DATA_SEED = 0
BATCH = 32
WARMUP = 0.1
"""Share of the recovery in which the learning rate rises."""


@dataclass(frozen=True)
class Setting:
    """A benchmark: a recipe, of which teacher, data and training arguments are taken.

    Attributes:
        recipe: Its file.
        train: Training examples that recovery uses, the same for all.
        evaluation: Held-out examples.
        epochs: Epochs of recovery.
        calibration: Training examples that a method sees; each seed draws its own.
        selection: Training examples, apart from those, on which a method with several settings
            chooses.
    """

    recipe: str
    train: int
    evaluation: int
    epochs: float = 1
    calibration: int = 512
    selection: int = 256


SETTINGS = {
    "text": Setting("recipes/text/tweets_minilm.yaml", train=2048, evaluation=1500),
    "image": Setting("recipes/image/fashion_mnist_vit.yaml", train=4096, evaluation=3000),
    "resnet": Setting("recipes/image/fashion_mnist_resnet.yaml", train=4096, evaluation=3000),
    "speech": Setting(
        "recipes/speech/prompts_whisper.yaml", train=640, evaluation=500, calibration=256
    ),
    "digits": Setting(
        "recipes/image/digits_vit.yaml", train=1181, evaluation=360, epochs=5, selection=256
    ),
}


class RememberedTeacher(nn.Module):
    """A teacher that ran once over the training rows: all recoveries distil the same logits."""

    def __init__(self, config: PreTrainedConfig, logits: torch.Tensor) -> None:
        super().__init__()
        self.config = config
        self.logits = nn.Parameter(logits)

    @classmethod
    def of(cls, teacher: PreTrainedModel, batches: Sequence[Batch]) -> RememberedTeacher:
        with evaluating(teacher):
            logits = torch.cat([teacher(**batch).logits for batch in batches])
        return cls(teacher.config, logits)

    def forward(self, row: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits of rows, `[batch, classes]`."""
        return {"logits": self.logits[row]}


@dataclass(frozen=True, eq=False)
class Task:
    """A benchmark's examples and models, ready to use.

    Attributes:
        name: A key of `SETTINGS`.
        setting: How much of the data is used.
        teacher: The trained model.
        train: Rows for recovery; calibration examples are drawn from them.
        selection: Batches of training examples that recovery does not see.
        evaluation: Batches of held-out examples.
        collate: Makes a batch of rows.
        remembered: The teacher's logits of `train`.
        arguments: Training arguments of the recovery.
        bench: The recipe's data and processor.
    """

    name: str
    setting: Setting
    teacher: PreTrainedModel
    train: Sequence[Batch]
    selection: Sequence[Batch]
    evaluation: Sequence[Batch]
    collate: Callable[[list[Batch]], dict[str, torch.Tensor]]
    remembered: RememberedTeacher
    arguments: Mapping[str, Any]
    bench: TaskExamples

    @classmethod
    def prepare(cls, name: str, setting: Setting, recipe: Recipe, teacher: str) -> Task:
        """Load the teacher and read the examples once, features included."""
        evaluation = TrainingArguments(use_cpu=uses_cpu(), report_to="none")
        bench = TaskExamples.prepare(
            recipe.task, recipe.data, recipe.metric, recipe.seed, evaluation, model=teacher
        )
        model = bench.load_model(teacher).eval()
        collate = bench.task.collator(bench.processor)
        held = bench.eval.shuffle(seed=DATA_SEED)
        held = held.select(range(min(setting.evaluation, len(held))))
        pool = bench.train.shuffle(seed=DATA_SEED)
        needed = setting.selection + setting.train
        if needed > len(pool):
            raise SystemExit(f"error: {name} needs {needed} training examples, has {len(pool)}")
        parts = [
            held,
            pool.select(range(setting.selection)),
            pool.select(range(setting.selection, needed)),
        ]
        if bench.task.lazy:
            # Images and sounds are processed whenever they are read: read them once.
            rows = [[_first(collate([row])) for row in part] for part in parts]
            collate = default_data_collator
        else:
            rows = [sorted(part, key=lambda row: len(row["input_ids"])) for part in parts]
        accepted = accepted_inputs(model)
        rows = [[{k: v for k, v in row.items() if k in accepted} for row in part] for part in rows]
        arguments = {**recipe.training, **_stage(recipe, "recover").training}
        arguments |= {"num_train_epochs": setting.epochs, "warmup_steps": WARMUP}
        return cls(
            name,
            setting,
            model,
            rows[2],
            _batches(rows[1], collate),
            _batches(rows[0], collate),
            collate,
            RememberedTeacher.of(model, _batches(rows[2], collate)),
            arguments,
            bench,
        )

    def problem(self, seed: int) -> Problem:
        """Draw the examples that a method sees."""
        rows = random.Random(seed).sample(self.train, self.setting.calibration)
        return Problem(self.teacher, _batches(rows, self.collate), self.inputs(), seed)

    def inputs(self, batch_size: int = 1) -> dict[str, torch.Tensor]:
        """Return the input at which multiply-accumulates are counted and latency is taken."""
        return self.bench.inputs(self.teacher, batch_size)


def train_teacher(recipe: Recipe) -> str:
    """Train the recipe's teacher, unless that is done, and return its folder."""
    return str(runner.run(replace(recipe, stages=(_stage(recipe, "transfer"),))))


def _stage(recipe: Recipe, name: str) -> Any:
    return next(stage for stage in recipe.stages if stage.name == name)


def _first(batch: Mapping[str, torch.Tensor]) -> Batch:
    return {name: value[0] for name, value in batch.items()}


def _batches(rows: list[Batch], collate: Callable[[list[Batch]], Any]) -> list[Batch]:
    return [dict(collate(rows[i : i + BATCH])) for i in range(0, len(rows), BATCH)]
