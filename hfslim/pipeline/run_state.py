"""The state of a run: the recipe, its examples, the manifest and the current model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from hfslim.anatomy.adapters import merge_adapters
from hfslim.anatomy.outputs import label_names, pair_names
from hfslim.anatomy.weights import sparse_modules
from hfslim.distillation.teacher.adapted import saved_config
from hfslim.distillation.teacher.labels import align_labels
from hfslim.distillation.teacher.teacher import load_teacher, split_revision
from hfslim.pipeline.manifest import Manifest, StageRecord
from hfslim.pipeline.opening import explained, sources_of
from hfslim.pipeline.recipe import Recipe
from hfslim.pipeline.task_examples import TaskExamples
from hfslim.reporting.training_curves import training_curves
from hfslim.sparsity.weight_callback import WeightPruningCallback
from hfslim.tasks import build_model
from hfslim.training.checkpoint_folders import last_whole
from hfslim.training.parallel import save_where_asked

logger = logging.getLogger(__name__)


@dataclass
class RunState(TaskExamples):
    """The examples of a recipe, and what changes from stage to stage.

    Attributes:
        recipe: The recipe.
        manifest: The record of the stages.
        source: Hub id or folder of the current model; None while there is only its config.
        whole: Hub id or folder of the model before its first cut.
        latest: The record of the stage that made the current model.
        arguments: Arguments of the stages that train, by their folders.
    """

    recipe: Recipe
    manifest: Manifest
    source: str | None
    whole: str | None = None
    latest: StageRecord | None = None
    arguments: Mapping[str, TrainingArguments] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        recipe: Recipe,
        manifest: Manifest,
        evaluation: TrainingArguments,
        arguments: Mapping[str, TrainingArguments],
    ) -> Self:
        """Load data and processor, and check the labels of the teachers."""
        state = cls.prepare(
            recipe.task,
            recipe.data,
            recipe.metric,
            recipe.seed,
            evaluation,
            recipe.model,
            recipe.model_config,
            recipe.processor,
            new_head=recipe.stages[0].takes_untrained,
            recipe=recipe,
            manifest=manifest,
            source=recipe.model,
            arguments=arguments,
        )
        own = PreTrainedConfig(**state.examples.labels.config)
        for stage in recipe.stages:
            if stage.taught:
                subset = stage.settings["training"].get("teacher_subset", False)
                for teacher in stage.named_teachers or sources_of(recipe.teacher):
                    source, revision = split_revision(teacher)
                    with explained(f"teacher {teacher!r}"):
                        config = saved_config(source, revision, labels=own)
                        align_labels(own, config, subset)
                        state.task.check_model(config, recipe.data)
        return state

    def folder_of(self, record: StageRecord) -> Path:
        """Return the folder of a stage."""
        return self.manifest.folder / record.folder

    def save_manifest(self) -> None:
        """Write the manifest, on the processes that write."""
        if self.evaluation.should_save:
            self.manifest.write()

    def load(self, new_head: bool = False) -> PreTrainedModel:
        """Load the current model.

        Args:
            new_head: Whether a classification head for other labels is replaced by a new one.
        """
        if self.source is None:
            settings = self.recipe.model_config or {}
            return build_model(self.task, settings, self.examples.labels, self.processor)
        return self.load_model(self.source, new_head)

    def rename(self, model: Any) -> None:
        """Give the model before the first cut, whose outputs are the same, the run's labels."""
        for name, value in self.examples.labels.config.items():
            setattr(model.config, name, value)

    def teacher(self, source: str, student: Any, allow_untrained: bool) -> Any:
        """Return a teacher's source, or the teacher with its outputs named as the student's.

        A teacher without names for its outputs has the order of the data, and a model of this run
        the order of the student; the Trainer would pair either with the student by position.
        """
        own = self.examples.labels
        place = split_revision(source)
        names = label_names(saved_config(*place, labels=student.config))
        try:
            theirs = (
                own if source in (self.whole, self.source) else self.examples.paired(names).labels
            )
            order = tuple(theirs.in_data.index(one) for one in own.in_data)
        except ValueError:
            return source  # The Trainer refuses it.
        with suppress(ValueError):
            if pair_names(own.names, names).order == order:
                return source
        model: Any = load_teacher(source, student, allow_untrained)
        for output, name in zip(order, own.names, strict=True):
            model.config.id2label[output] = name
        model.config.label2id = {name: i for i, name in model.config.id2label.items()}
        return model

    def train_and_save(self, trainer: Trainer, record: StageRecord) -> None:
        """Train from the last checkpoint of an interrupted run or from the start, and save.

        Zeros of sparse weights are held; adapters are merged into the weights that are saved.
        """
        checkpoint, _ = last_whole(Path(str(trainer.args.output_dir)))
        hold_zeros(trainer)
        trainer.train(resume_from_checkpoint=all(gather_object([checkpoint is not None])))
        record.steps = trainer.state.global_step
        record.series = training_curves(trainer.state.log_history)
        plain = merge_adapters(trainer.model)
        if plain is not trainer.model:
            self.save_whole(plain, record)
            return
        result = trainer.evaluate()
        record.metrics = {name: result[f"eval_{name}"] for name in (self.metric, "loss")}
        trainer.save_model(str(self.folder_of(record)))

    def save_whole(self, model: PreTrainedModel, record: StageRecord) -> None:
        """Save a model that no Trainer holds, on the processes that write, and evaluate it."""
        if self.evaluation.should_save:
            save_where_asked(model)
            for part in (model, self.processor):
                part.save_pretrained(self.folder_of(record))
        PartialState().wait_for_everyone()
        record.metrics = self.evaluate(model).metrics


def hold_zeros(trainer: Trainer) -> None:
    """Hold the zeros of sparse weights, unless a callback of the Trainer holds all of them.

    Raises:
        ValueError: A callback prunes some sparse weights and would lose the zeros of others.
    """
    model: Any = trainer.model
    sparse = sparse_modules(model)
    callbacks = trainer.callback_handler.callbacks
    own = next((c for c in callbacks if isinstance(c, WeightPruningCallback)), None)
    if own is not None:
        lost = [path for path in sparse if path not in own.find(model)]
        if lost:
            raise ValueError(
                f"{len(lost)} sparse weights, such as {lost[0]!r}, are not among those that "
                "this stage prunes, so their zeros would be lost: add them to target_modules"
            )
    elif sparse:
        trainer.add_callback(WeightPruningCallback(target_modules=sparse))
