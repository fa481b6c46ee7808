"""Run a recipe: each stage once, in order, each leaving a model that loads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainingArguments, set_seed

from hfslim.distillation import DistillationConfig, DistillationTrainer
from hfslim.distillation.student import student_structure
from hfslim.hub.card import RECIPE
from hfslim.hub.push import check_login, push
from hfslim.measuring.measurement import compare
from hfslim.pipeline.launch import check_folder, check_launch, launch_arguments
from hfslim.pipeline.manifest import Entry, Manifest, OutputError, alone, on_disk
from hfslim.pipeline.recipe import Recipe, RecipeError, recipe_yaml
from hfslim.pipeline.run_report import current_report, judge_pair, run_report
from hfslim.pipeline.run_state import Work
from hfslim.pipeline.stages import (
    Cut,
    Distil,
    Measure,
    Prune,
    Push,
    Recover,
    Sparsify,
    Stage,
    Student,
    Transfer,
)
from hfslim.pruning import Batches, PruningCallback, prune, shrink
from hfslim.reporting.page import write_all
from hfslim.reporting.report import REPORT
from hfslim.reporting.staged_writes import flush
from hfslim.reporting.unit_rows import unit_rows
from hfslim.sparsity import sparsify
from hfslim.tasks import TASKS
from hfslim.training.checkpoint import SlimTrainer
from hfslim.training.checkpoint_folders import stage_errors
from hfslim.training.parallel import forget_trainers, loading_whole
from hfslim.training.transfer import L2SP, GradualUnfreezing, train_head_only, with_lora

__all__ = ["run"]

logger = logging.getLogger(__name__)


@loading_whole()
def run(recipe: Recipe) -> Path:
    """Run the stages of a recipe that are not finished yet.

    Every process of a launch calls this; the first one writes. Under FSDP each loads whole models,
    as scoring and cutting need them.

    Args:
        recipe: What to do.

    Returns:
        The folder of the last model.

    Raises:
        CheckpointError: What a stage made cannot be written: the disk is full, for instance.
        OutputError: `output_dir` holds something else, another run writes to it, or the recipe has
            changed since a stage ran.
        PushError: The Hub refuses the token, which is asked before the first stage, or the push.
        RecipeError: The data, the model or a target do not allow what the recipe asks.
    """
    plan = [(stage, f"{number:02d}-{stage.name}") for number, stage in enumerate(recipe.stages, 1)]
    folder = Path(recipe.output_dir)
    arguments = {
        name: _arguments(recipe, stage, folder / name / "training")
        for stage, name in plan
        if _trains(stage)
    }
    evaluation = _arguments(recipe, Transfer(), folder)
    forget_trainers()
    seen = on_disk(folder)
    manifest = Manifest.open(folder, _base(recipe))
    manifest.check([stage.name for stage, _ in plan], [stage.settings for stage, _ in plan])
    process = PartialState()
    reported = not process.is_main_process or (folder / REPORT).exists()
    if _everywhere(manifest.finished(len(plan)) and reported):
        logger.info("finished before, report in %s", folder)
        return folder / next(n for s, n in reversed(plan) if not isinstance(s, Measure | Push))
    if process.is_main_process and _will_push(manifest, plan):
        check_login()
    try:
        check_launch([(stage, arguments.get(name)) for stage, name in plan])
        check_folder(folder, evaluation)
        each = evaluation.save_on_each_node
        with process.local_main_process_first() if each else process.main_process_first():
            work = Work.begin(recipe, manifest, evaluation, arguments)
        process.wait_for_everyone()
        work.check_target()
    except ValueError as error:
        raise RecipeError(str(error)) from error
    writes = evaluation.should_save
    with stage_errors("results", folder), alone(folder) if writes else nullcontext(True) as free:
        if not _everywhere(free and on_disk(folder) == seen):
            raise OutputError(
                f"another run writes to {folder}: give the command again when that has ended, or "
                "set another output_dir"
            )
        _run_stages(work, plan)
        _publish(work)
    return Path(work.source or folder)


def _run_stages(work: Work, plan: list[tuple[Stage, str]]) -> None:
    """Run the stages that are not finished, each on what the ones before made."""
    folder = work.manifest.folder
    for number, (stage, name) in enumerate(plan, 1):
        entry = work.manifest.begin(stage.name, name, stage.settings)
        label = f"stage {number} of {len(plan)}, {stage.name}"
        if _everywhere(entry.finished):
            logger.info("%s: finished before, in %s", label, folder / name)
        else:
            logger.info("%s", label)
            with stage_errors(name, folder):
                _run_stage(work, stage, entry)
            if entry.metrics:
                figures = ", ".join(f"{k} {v:.4f}" for k, v in entry.metrics.items())
                logger.info("%s: %s, saved in %s", label, figures, folder / name)
        if isinstance(stage, Cut) and work.whole is None:
            work.whole = work.source
        if not isinstance(stage, Measure | Push):
            work.source, work.latest = str(folder / name), entry


def _run_stage(work: Work, stage: Stage, entry: Entry) -> None:
    """Run a stage, and note that it is finished once all that it made is on the disk."""
    process = PartialState()
    entry.finished = False
    work.save_manifest()
    set_seed(work.recipe.seed)
    RUNNERS[type(stage)](work, stage, entry, work.arguments.get(entry.folder))
    forget_trainers()
    if work.evaluation.should_save:
        flush(work.manifest.folder)
    process.wait_for_everyone()
    entry.finished = True
    work.save_manifest()


def _everywhere(here: bool) -> bool:
    """Tell whether something holds on all processes, whose machines may share no folder."""
    return all(gather_object([here]))


def _publish(work: Work) -> None:
    """Write the report of the last model beside the stages."""
    report = current_report(work)
    if PartialState().is_main_process:
        write_all(report, work.manifest.folder, "tensorboard" in (work.evaluation.report_to or ()))
        for warning in report.warnings:
            logger.warning("warning: %s", warning)


def _will_push(manifest: Manifest, plan: list[tuple[Stage, str]]) -> bool:
    done = {entry.folder for entry in manifest.stages if entry.finished}
    return any(isinstance(stage, Push) and name not in done for stage, name in plan)


def _trains(stage: Stage) -> bool:
    return isinstance(stage, Transfer | Distil | Recover) or (
        isinstance(stage, Cut) and stage.gradual
    )


def _arguments(recipe: Recipe, stage: Any, folder: Path) -> TrainingArguments:
    cls = TrainingArguments if isinstance(stage, Transfer) else DistillationConfig
    return cls(
        **launch_arguments({**recipe.training, **stage.training}),
        output_dir=str(folder),
        seed=recipe.seed,
        remove_unused_columns=not TASKS[recipe.task].lazy,
    )


def _base(recipe: Recipe) -> dict[str, Any]:
    base = {
        key: value for key, value in vars(recipe).items() if key not in ("stages", "output_dir")
    }
    return {**base, "data": dict(vars(recipe.data))}


def _transfer(work: Work, stage: Transfer, entry: Entry, args: Any) -> None:
    model: Any = work.load(new_head=True)
    callbacks: list[TrainerCallback] = []
    if stage.method == "head":
        model = train_head_only(model)
    elif stage.method == "lora":
        model = with_lora(model, stage.lora_rank)
    elif stage.method == "gradual":
        callbacks.append(GradualUnfreezing(stage.unfrozen_at))
    if stage.l2_sp:
        callbacks.append(L2SP(stage.l2_sp))
    trainer = SlimTrainer(model=model, args=args, callbacks=callbacks, **work.trainer_parts())
    work.train_and_save(trainer, entry)


def _distil(work: Work, stage: Distil | Recover, entry: Entry, args: Any) -> None:
    model: Any = work.load(new_head=isinstance(stage, Distil))
    if stage.lora_rank is not None:
        model = with_lora(model, stage.lora_rank)
    trainer = DistillationTrainer(model=model, args=args, **work.taught_parts(work.teachers(stage)))
    work.train_and_save(trainer, entry)


def _prune(work: Work, stage: Prune, entry: Entry, args: Any) -> None:
    model, seed = work.load(), work.recipe.seed
    inputs = work.inputs(model, stage.batch_size)
    target, criterion = dict(stage.target), stage.criterion
    shared: dict[str, Any] = {"units": stage.units, "criterion": criterion, "inputs": inputs}
    logger.info("%s", stage)
    if stage.gradual:
        callback = PruningCallback(
            target,
            schedule=stage.schedule or "cubic",
            start=stage.start,
            end=stage.end,
            seed=seed,
            **shared,
        )
        trainer = DistillationTrainer(
            model=model,
            args=args,
            callbacks=[callback],
            **work.taught_parts(work.teachers(stage)),
        )
        work.train_and_save(trainer, entry)
        structure = callback.structure
        if structure is None:
            raise RuntimeError("training ended before pruning began")
        entry.structure, entry.units = structure.table(), unit_rows(structure, callback.scores)
        return
    torch.nn.Module.to(model, work.evaluation.device)
    result = prune(
        model,
        Batches(work.calibration(model, stage.max_examples), stage.max_examples),
        target,
        reconstruction=stage.reconstruction or "weights",
        seed=seed,
        progress=PartialState().is_main_process,
        **shared,
    )
    entry.structure = result.structure.table()
    entry.units = unit_rows(result.structure, result.scores)
    work.save_whole(model, entry)


def _student(work: Work, stage: Student, entry: Entry, args: Any) -> None:
    teacher = work.load()
    torch.nn.Module.to(teacher, work.evaluation.device)
    structure = student_structure(
        teacher,
        **stage.numbers,
        data=work.calibration(teacher, stage.max_examples),
        max_examples=stage.max_examples,
        progress=PartialState().is_main_process,
    )
    entry.structure = structure.table()
    work.save_whole(shrink(teacher, structure), entry)


def _sparsify(work: Work, stage: Sparsify, entry: Entry, args: Any) -> None:
    model = work.load()
    if stage.gradual:
        parts = work.taught_parts(work.teachers(stage))
        callbacks = [stage.callback()]
        trainer = DistillationTrainer(model=model, args=args, callbacks=callbacks, **parts)
        work.train_and_save(trainer, entry)
        return
    torch.nn.Module.to(model, work.evaluation.device)
    sparsify(
        model,
        work.calibration(model, stage.max_examples),
        stage.sparsity,
        stage.pattern,
        method=stage.method,  # type: ignore[arg-type]  # which the stage has checked
        scope=stage.scope,
        max_examples=stage.max_examples,
        target_modules=stage.target_modules,
        exclude_modules=stage.exclude_modules,
        progress=PartialState().is_main_process,
    )
    work.save_whole(model, entry)


def _measure(work: Work, stage: Measure, entry: Entry, args: Any) -> None:
    pair = judge_pair(work)
    assert pair.before is not None  # which the recipe has checked
    if not PartialState().is_main_process:
        return
    folder, device = work.manifest.folder / entry.folder, work.evaluation.device
    before: Any = pair.before
    after: Any = pair.after
    for model in (before, after):
        model.to(device=device)
    comparisons = []
    for size in stage.batch_sizes:
        logger.info("measuring at batch %d on %s", size, device)
        inputs = work.inputs(after, size, stage.length)
        theirs = inputs if pair.processor is None else work.inputs(before, size, stage.length)
        comparisons.append(compare(before, after, inputs, before_inputs=theirs))
    report = run_report(work, pair, comparisons)
    report.print()
    report.write(folder)
    logger.info("report in %s", folder)


def _push(work: Work, stage: Push, entry: Entry, args: Any) -> None:
    report = current_report(work)
    if not PartialState().is_main_process:
        return
    folder = work.manifest.folder / entry.folder
    model = TASKS[work.recipe.task].auto_model.from_pretrained(work.source)
    for part in (model, work.processor):
        part.save_pretrained(folder)
    report.write(folder)
    (folder / RECIPE).write_text(recipe_yaml(work.recipe), encoding="utf-8")
    commit = push(
        folder, stage.hub_model_id, private=stage.hub_private_repo, revision=stage.hub_revision
    )
    logger.info("pushed %s: %s", folder, commit.commit_url)


RUNNERS: dict[type[Stage], Callable[[Work, Any, Entry, Any], None]] = {
    Transfer: _transfer,
    Distil: _distil,
    Prune: _prune,
    Student: _student,
    Sparsify: _sparsify,
    Recover: _distil,
    Measure: _measure,
    Push: _push,
}
