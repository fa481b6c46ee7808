"""What the stages of a pipeline share: the examples, and the model as it stands."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hfslim.anatomy.adapters import merge_adapters
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.weights import find_weights, sparse_modules
from hfslim.distillation.student import student_structure
from hfslim.distillation.teacher.adapted import saved_config
from hfslim.distillation.teacher.labels import align_labels
from hfslim.distillation.teacher.teacher import split_revision
from hfslim.pipeline.manifest import Entry, Manifest
from hfslim.pipeline.opening import explained
from hfslim.pipeline.recipe import Recipe
from hfslim.pipeline.stages import Cut, Distil, Prune, Recover, Sparsify, Student, listed
from hfslim.pipeline.task_examples import Workbench
from hfslim.pruning.search.search import Search
from hfslim.pruning.steps import check_reachable
from hfslim.pruning.target import Target
from hfslim.reporting.training_curves import training_curves
from hfslim.sparsity.weight_callback import WeightPruningCallback
from hfslim.tasks import build_model
from hfslim.training.checkpoint_folders import last_whole
from hfslim.training.parallel import save_where_asked

logger = logging.getLogger(__name__)


@dataclass
class Work(Workbench):
    """A workbench with what the stages share, and the model as it stands.

    Attributes:
        recipe: What to do.
        manifest: What is done.
        source: Hub id or folder of the current model; None while it is but a config.
        whole: Hub id or folder of the model before its first cut.
        latest: The stage that made the current model.
        arguments: Arguments of the stages that train, by their folders.
    """

    recipe: Recipe
    manifest: Manifest
    source: str | None
    whole: str | None = None
    latest: Entry | None = None
    arguments: Mapping[str, TrainingArguments] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        recipe: Recipe,
        manifest: Manifest,
        evaluation: TrainingArguments,
        arguments: Mapping[str, TrainingArguments],
    ) -> Self:
        """Load data and processor, and check what needs no model."""
        work = cls.prepare(
            recipe.task,
            recipe.data,
            recipe.metric,
            recipe.seed,
            evaluation,
            recipe.model,
            recipe.model_config,
            recipe.processor,
            recipe=recipe,
            manifest=manifest,
            source=recipe.model,
            arguments=arguments,
        )
        work.check_teachers()
        return work

    def check_teachers(self) -> None:
        """Refuse a teacher of other labels before any stage has run."""
        own = PreTrainedConfig(**self.examples.labels.config)
        for stage in self.recipe.stages:
            if isinstance(stage, Distil | Recover) or (isinstance(stage, Cut) and stage.gradual):
                for teacher in listed(stage.teacher or self.recipe.teacher):
                    source, revision = split_revision(teacher)
                    with explained(f"teacher {teacher!r}"):
                        config = saved_config(source, revision, labels=own)
                        align_labels(own, config, stage.training.get("teacher_subset", False))

    def teachers(self, stage: Distil | Recover | Cut) -> tuple[str, ...]:
        """Return the sources of a stage's teachers, as things stand."""
        given = stage.teacher or self.recipe.teacher or self.whole
        return listed(given or (self.source if isinstance(stage, Cut) else None))

    def check_target(self) -> None:
        """Refuse what the model cannot lose, before it is trained: a student, modules, a target.

        Every process calls this: a latency is measured by the first for all.
        """
        for stage in self.recipe.stages:
            if isinstance(stage, Sparsify):
                find_weights(self.load(new_head=True), stage.target_modules, stage.exclude_modules)
            if isinstance(stage, Student):
                student_structure(self.load(new_head=True), **stage.numbers)
        cut = next((stage for stage in self.recipe.stages if isinstance(stage, Prune)), None)
        if cut is not None:
            model = self.load(new_head=True)
            torch.nn.Module.to(model, self.evaluation.device)
            units = find_units(model, "dimensions" in cut.units).of(cut.units)
            goal = Target.parse(cut.target, cut.units)
            inputs = self.inputs(model, cut.batch_size)
            shown = PartialState().is_main_process
            check_reachable(Search.priced(model, units, goal, inputs, progress=shown))

    def save_manifest(self) -> None:
        """Write the manifest, on the processes that write."""
        if self.evaluation.should_save:
            self.manifest.write()

    def load(self, new_head: bool = False) -> PreTrainedModel:
        """Load the current model."""
        if self.source is None:
            return build_model(self.task, self.recipe.model_config or {}, self.examples.labels)
        return self.load_model(self.source, new_head)

    def train_and_save(self, trainer: Trainer, entry: Entry) -> None:
        """Train, going on from an interrupted run's last checkpoint, evaluate and save.

        Zeros of sparse weights are held; adapters are folded into the weights that are saved.
        """
        own = Path(str(trainer.args.output_dir))
        whole, _ = last_whole(own)
        self._hold_zeros(trainer)
        trainer.train(resume_from_checkpoint=all(gather_object([whole is not None])))
        entry.steps, entry.series = (
            trainer.state.global_step,
            training_curves(trainer.state.log_history),
        )
        plain = merge_adapters(trainer.model)
        if plain is not trainer.model:
            self.save_whole(plain, entry)
            return
        entry.metrics = self.metrics(trainer)
        trainer.save_model(str(self.manifest.folder / entry.folder))

    def save_whole(self, model: PreTrainedModel, entry: Entry) -> None:
        """Save a model that no Trainer holds, on the processes that write, and evaluate it."""
        folder = self.manifest.folder / entry.folder
        if self.evaluation.should_save:
            save_where_asked(model)
            for part in (model, self.processor):
                part.save_pretrained(folder)
        PartialState().wait_for_everyone()
        entry.metrics = self.evaluate(model)

    @staticmethod
    def _hold_zeros(trainer: Trainer) -> None:
        """Hold the zeros of sparse weights, all of them or those that a callback does not.

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
