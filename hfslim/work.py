"""What the stages of a pipeline share: examples, processor, and the model as it stands."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from hfslim.anatomy import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.checkpoint import SlimTrainer
from hfslim.distill.teacher import accepted_inputs, align_labels
from hfslim.manifest import Entry, Manifest
from hfslim.prune.steps import check_reachable, price
from hfslim.prune.target import Target
from hfslim.recipe import Recipe, RecipeError
from hfslim.stages import Distil, Prune, Recover
from hfslim.tasks import TASKS, Examples, build_model, compute_metrics, load_model

logger = logging.getLogger(__name__)


@dataclass
class Work:
    """What the stages share, and the model as it stands.

    Attributes:
        recipe: What to do.
        manifest: What is done.
        evaluation: Arguments of evaluations outside training.
        examples: Checked examples, labels in the model's order.
        processor: Tokenizer, image processor or feature extractor.
        train: Training examples as the Trainer wants them.
        eval: Evaluation examples as the Trainer wants them.
        source: Hub id or folder of the current model; None while it is but a config.
        whole: Hub id or folder of the model before its first cut.
        latest: The stage that made the current model.
    """

    recipe: Recipe
    manifest: Manifest
    evaluation: TrainingArguments
    examples: Examples
    processor: Any
    train: Any
    eval: Any
    source: str | None
    whole: str | None = None
    latest: Entry | None = None

    @classmethod
    def prepare(cls, recipe: Recipe, manifest: Manifest, evaluation: TrainingArguments) -> Work:
        """Load data and processor, and check all that can be checked before the first stage."""
        task, data = TASKS[recipe.task], recipe.data
        with _explained("data"):
            examples = task.load_examples(data, recipe.seed)
        labels = examples.labels
        compute_metrics(recipe.metric, labels.problem, len(labels.names))
        if recipe.model is not None:
            with _explained(f"model {recipe.model!r}"):
                config = AutoConfig.from_pretrained(recipe.model)
            examples = examples.with_order_of(config.id2label)
            source = recipe.processor or recipe.model
            with _explained(f"processor {source!r}"):
                processor = task.load_processor(source, config)
        else:
            config = build_model(task, recipe.model_config or {}, labels).config
            with _explained(f"processor {recipe.processor!r}"):
                processor = task.load_processor(recipe.processor, config)
        train, held = (
            task.prepare(part, examples, data, processor)
            for part in (examples.train, examples.evaluation)
        )
        work = cls(recipe, manifest, evaluation, examples, processor, train, held, recipe.model)
        work.check_teachers()
        return work

    def check_teachers(self) -> None:
        """Refuse a teacher of other labels before any stage has run."""
        own = PreTrainedConfig(**self.examples.labels.config)
        for stage in self.recipe.stages:
            if isinstance(stage, Distil | Recover) or (isinstance(stage, Prune) and stage.gradual):
                teacher = stage.teacher or self.recipe.teacher
                if teacher:
                    with _explained(f"teacher {teacher!r}"):
                        align_labels(own, AutoConfig.from_pretrained(teacher))

    def check_target(self) -> None:
        """Refuse a target of the first cut that the model cannot reach, before it is trained.

        Every process calls this: a latency is measured by the first for all.
        """
        cut = next((stage for stage in self.recipe.stages if isinstance(stage, Prune)), None)
        if cut is not None:
            model = self.load(new_head=True)
            torch.nn.Module.to(model, self.evaluation.device)
            units, goal = find_units(model).of(cut.units), Target.parse(cut.target, cut.units)
            inputs = self.inputs(model, cut.batch_size)
            shown = PartialState().is_main_process
            check_reachable(units, goal, price(model, units, goal, inputs, shown))

    def save_manifest(self) -> None:
        """Write the manifest, on the first process."""
        if PartialState().is_main_process:
            self.manifest.write()

    def load(self, new_head: bool = False) -> PreTrainedModel:
        """Load the current model."""
        task, labels = TASKS[self.recipe.task], self.examples.labels
        if self.source is None:
            return build_model(task, self.recipe.model_config or {}, labels)
        model = load_model(task, self.source, labels, new_head)
        padding = getattr(self.processor, "pad_token_id", None)
        if padding is not None and getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = padding
        return model

    def inputs(
        self, model: PreTrainedModel, batch_size: int = 1, length: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the input at which the costs of a model are stated."""
        if length is None:
            length = TASKS[self.recipe.task].stated_length(self.recipe.data, self.processor)
        return example_inputs(model, batch_size, length=length)

    def trainer_parts(self) -> dict[str, Any]:
        """Return what every Trainer of this recipe is given."""
        labels = self.examples.labels
        return {
            "train_dataset": self.train,
            "eval_dataset": self.eval,
            "data_collator": TASKS[self.recipe.task].collator(self.recipe.data, self.processor),
            "processing_class": self.processor,
            "compute_metrics": compute_metrics(
                self.recipe.metric, labels.problem, len(labels.names)
            ),
        }

    def evaluate(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the metric and the loss of a model on the evaluation examples."""
        trainer = SlimTrainer(model=model, args=self.evaluation, **self.trainer_parts())
        return self.metrics(trainer)

    def metrics(self, trainer: Trainer) -> dict[str, float]:
        """Return the metric and the loss of a Trainer's model."""
        result = trainer.evaluate()
        return {name: result[f"eval_{name}"] for name in (self.recipe.metric, "loss")}

    def train_and_save(self, trainer: Trainer, entry: Entry) -> None:
        """Train, going on from an interrupted run's last checkpoint, evaluate and save."""
        own = Path(str(trainer.args.output_dir))
        checkpoint = get_last_checkpoint(str(own)) if own.is_dir() else None
        if checkpoint:
            logger.info("resuming from %s", checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)
        entry.metrics = self.metrics(trainer)
        trainer.save_model(str(self.manifest.folder / entry.folder))

    def calibration(self, model: PreTrainedModel, size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield this process's share of the batches that units are scored on."""
        process = PartialState()
        chosen = self.train.shuffle(seed=self.recipe.seed)
        chosen = chosen.select(range(min(size, len(chosen))))
        accepted = accepted_inputs(model)
        loader: DataLoader[Any] = DataLoader(
            chosen.shard(process.num_processes, process.process_index),
            batch_size=self.evaluation.per_device_train_batch_size,
            collate_fn=self.trainer_parts()["data_collator"],
        )
        for batch in loader:
            yield {key: value for key, value in batch.items() if key in accepted}


@contextmanager
def _explained(place: str) -> Iterator[None]:
    """Say which part of a recipe cannot be read."""
    try:
        yield
    except OSError as error:
        raise RecipeError(f"{place} cannot be read: {' '.join(str(error).split())}") from error
