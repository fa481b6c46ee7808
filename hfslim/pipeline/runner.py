"""Run a recipe: each stage once, in order."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainingArguments, set_seed

from hfslim.hub.push import check_login
from hfslim.pipeline.launch import check_folder, check_launch, launch_arguments
from hfslim.pipeline.manifest import Manifest, OutputError, StageRecord, alone, on_disk
from hfslim.pipeline.recipe import Recipe, RecipeError
from hfslim.pipeline.run_report import current_report
from hfslim.pipeline.run_state import RunState
from hfslim.pipeline.stages import Stage
from hfslim.reporting.page import write_all
from hfslim.reporting.report import REPORT
from hfslim.reporting.staged_writes import flush
from hfslim.tasks import TASKS
from hfslim.training.checkpoint_folders import stage_errors
from hfslim.training.parallel import forget_trainers, loading_whole

__all__ = ["run"]

logger = logging.getLogger(__name__)

LATER_KEYS = ("label_names", "positive_label")


@loading_whole()
def run(recipe: Recipe) -> Path:
    """Run the stages of a recipe that are not finished yet.

    Every process of a launch calls this; the first one writes. Under FSDP each process loads whole
    models, as scoring and cutting need them.

    Returns:
        The folder of the last model.

    Raises:
        CheckpointError: The results of a stage cannot be written, for instance on a full disk.
        OutputError: `output_dir` holds something else, another run writes to it, or the recipe has
            changed since a stage ran.
        PushError: The Hub refuses the token, which is tried before the first stage, or the push.
        RecipeError: The data, the model or a target do not allow what the recipe asks for.
    """
    plan = [(stage, f"{number:02d}-{stage.name}") for number, stage in enumerate(recipe.stages, 1)]
    folder = Path(recipe.output_dir)
    arguments = {
        name: _arguments(recipe, stage.arguments, stage.settings["training"], folder, name)
        for stage, name in plan
        if stage.arguments is not None and stage.trains
    }
    evaluation = _arguments(recipe, TrainingArguments, {}, folder)
    forget_trainers()
    seen = on_disk(folder)
    manifest = Manifest.open(folder, _settings(recipe))
    manifest.check([stage.name for stage, _ in plan], [stage.settings for stage, _ in plan])
    process = PartialState()
    reported = not process.is_main_process or (folder / REPORT).exists()
    if _everywhere(manifest.finished(len(plan)) and reported):
        logger.info("finished before, report in %s", folder)
        made = [folder / name for stage, name in plan if stage.makes_model]
        return made[-1] if made else Path(recipe.model or folder)
    done = {record.folder for record in manifest.stages if record.finished}
    if process.is_main_process and any(s.uploads and name not in done for s, name in plan):
        check_login()
    try:
        check_launch([(stage, arguments.get(name)) for stage, name in plan])
        check_folder(folder, evaluation)
        each = evaluation.save_on_each_node
        with process.local_main_process_first() if each else process.main_process_first():
            state = RunState.begin(recipe, manifest, evaluation, arguments)
        process.wait_for_everyone()
        for stage in recipe.stages:
            stage.check_model(state)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    writes = evaluation.should_save
    with stage_errors("results", folder), alone(folder) if writes else nullcontext(True) as free:
        if not _everywhere(free and on_disk(folder) == seen):
            raise OutputError(
                f"another run writes to {folder}: give the command again when that has ended, or "
                "set another output_dir"
            )
        _run_stages(state, plan)
        _publish(state)
    return Path(state.source or folder)


def _run_stages(state: RunState, plan: list[tuple[Stage, str]]) -> None:
    """Run the stages that are not finished, each on the model of the stages before it."""
    folder = state.manifest.folder
    for number, (stage, name) in enumerate(plan, 1):
        record = state.manifest.begin(stage.name, name, stage.settings)
        label = f"stage {number} of {len(plan)}, {stage.name}"
        if _everywhere(record.finished):
            logger.info("%s: finished before, in %s", label, folder / name)
        else:
            logger.info("%s", label)
            with stage_errors(name, folder):
                _run_stage(state, stage, record)
            if record.metrics:
                figures = ", ".join(f"{k} {v:.4f}" for k, v in record.metrics.items())
                logger.info("%s: %s, saved in %s", label, figures, folder / name)
        if stage.cuts and state.whole is None:
            state.whole = state.source
        if stage.makes_model:
            state.source, state.latest = str(folder / name), record


def _run_stage(state: RunState, stage: Stage, record: StageRecord) -> None:
    """Run a stage, and record that it is finished once its results are on the disk."""
    process = PartialState()
    record.finished = False
    state.save_manifest()
    set_seed(state.recipe.seed)
    stage.run(state, record, state.arguments.get(record.folder))
    forget_trainers()
    if state.evaluation.should_save:
        flush(state.manifest.folder)
    process.wait_for_everyone()
    record.finished = True
    state.save_manifest()


def _everywhere(here: bool) -> bool:
    """Return whether something holds on all processes, whose machines may share no folder."""
    return all(gather_object([here]))


def _publish(state: RunState) -> None:
    """Write the report of the last model beside the stages."""
    report = current_report(state)
    if PartialState().is_main_process:
        write_all(
            report, state.manifest.folder, "tensorboard" in (state.evaluation.report_to or ())
        )
        for warning in report.warnings:
            logger.warning("warning: %s", warning)


def _arguments(
    recipe: Recipe, cls: type, training: dict[str, Any], folder: Path, stage: str | None = None
) -> TrainingArguments:
    return cls(
        **launch_arguments({**recipe.training, **training}),
        output_dir=str(folder / stage / "training" if stage else folder),
        seed=recipe.seed,
        remove_unused_columns=not TASKS[recipe.task].lazy,
    )


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of a recipe outside its stages, which no later run may change."""
    values = {k: v for k, v in vars(recipe).items() if k not in ("stages", "output_dir")}
    # Runs that began before a key was there go on.
    data = {k: v for k, v in vars(recipe.data).items() if v is not None or k not in LATER_KEYS}
    return {**values, "metric": recipe.metric or "accuracy", "data": data}
