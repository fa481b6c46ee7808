"""What a run tells of its model: the report, from what the stages left behind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from hfslim.anatomy.weights import zeros_of
from hfslim.distillation import DistillationConfig
from hfslim.distillation.teacher.teacher import load_teacher
from hfslim.measuring.measurement import Comparison
from hfslim.pipeline.manifest import Manifest
from hfslim.pipeline.run_state import Work
from hfslim.pipeline.stages import Cut, Distil, Measure, Push, Recover, listed
from hfslim.pipeline.task_examples import Judged
from hfslim.reporting.provenance import Machine, Origin, Provenance
from hfslim.reporting.report import REPORT, Quality, Report
from hfslim.tasks import DataConfig
from hfslim.tasks.data import DIGITS

__all__ = ["Pair", "current_report", "judge_pair", "run_report"]

UNTRAINED = ", untrained"


class Pair(NamedTuple):
    """The current model and the one that it is compared with, and how both do.

    Attributes:
        after: The current model.
        before: The model before its first cut, else a teacher; None if there is neither.
        processor: That model's own processor; None where it reads the current model's inputs.
        now: How the current model does.
        teacher: How the other does.
    """

    after: PreTrainedModel
    before: PreTrainedModel | None
    processor: Any
    now: Judged
    teacher: Judged | None


def judge_pair(work: Work) -> Pair:
    """Load and evaluate the current model and the one before it; every process calls this."""
    after = work.task.auto_model.from_pretrained(work.source)
    now = work.judge(after)
    origin = work.whole or _first_teacher(work)
    if origin is None:
        return Pair(after, None, None, now, None)
    processor = None if work.whole else work.own_processor(origin)
    before = load_teacher(origin, after, allow_untrained=True)
    return Pair(after, before, processor, now, work.judge(before, processor))


def run_report(work: Work, pair: Pair, comparisons: Sequence[Comparison] = ()) -> Report:
    """Report on the current model.

    Args:
        work: The run.
        pair: The current model and the one before it, judged.
        comparisons: The two measured.
    """
    recipe, count = work.recipe, len(work.eval)
    teacher = None if pair.teacher is None else pair.teacher.metrics[recipe.metric]
    data = f"evaluation, {count:,} examples"
    value = pair.now.metrics[recipe.metric]
    losses = {
        name: args.objective if isinstance(args, DistillationConfig) else "loss_hard"
        for name, args in work.arguments.items()
    }
    base, answers = _base(work), work.answers(pair.now, pair.teacher)
    return Report(
        # What began untrained is trained by now.
        model=base.name.removesuffix(UNTRAINED),
        comparisons=comparisons,
        quality=[Quality(recipe.metric, value, teacher, data, count, (recipe.seed,))],
        structure=_structure(work.manifest),
        stages=[{one.name: _flat(one.settings)} for one in recipe.stages],
        weight_sparsity=zeros_of(pair.after),
        answers=answers,
        warnings=answers.hidden() if answers else (),
        curve=_curve(work, pair, comparisons),
        units=[
            {"stage": entry.folder, **row} for entry in work.manifest.stages for row in entry.units
        ],
        history=[
            {
                "stage": entry.folder,
                "steps": entry.steps,
                "series": entry.series,
                "metrics": {k: v for k, v in entry.metrics.items() if math.isfinite(v)},
            }
            for entry in work.manifest.stages
            if entry.metrics
        ],
        provenance=Provenance(
            task=recipe.task,
            base=base,
            teacher=_teacher(work),
            data=_data(recipe.data),
            losses=losses,
            seeds=(recipe.seed,),
            processes=PartialState().num_processes,
            machine=Machine.here(),
        ),
    )


def current_report(work: Work) -> Report:
    """Return the report of the current model, made by the stage that measured it or made now.

    Every process calls this.
    """
    # The first process measures. Where machines share no folder, it alone can read what it wrote.
    made = _measured(work) if PartialState().is_main_process else None
    return broadcast_object_list([made])[0] or run_report(work, judge_pair(work))


def _measured(work: Work) -> Report | None:
    """Return the report that a stage made of the current model."""
    for entry in reversed(work.manifest.stages):
        if entry is work.latest:
            break
        folder = work.manifest.folder / entry.folder
        if entry.name in (Measure.name, Push.name) and (folder / REPORT).exists():
            return Report.load(folder)
    return None


def _curve(work: Work, pair: Pair, comparisons: Sequence[Comparison]) -> list[Mapping[str, Any]]:
    """Return the points of the models measured so far, and of the current one before recovery."""
    points: list[Mapping[str, Any]] = []
    if not comparisons or pair.teacher is None or work.latest is None:
        return points
    metric, stages = work.recipe.metric, work.manifest.stages
    for entry in stages:
        if entry.name == Measure.name and entry.finished:
            points += Report.load(work.manifest.folder / entry.folder).curve
    known = {point["label"] for point in points}
    cut = next((e for e in reversed(stages) if e.structure and e is not work.latest), None)
    models = [("whole model" if work.whole else "teacher", "before", pair.teacher.metrics)]
    if cut is not None:
        models.append((cut.folder, "after", cut.metrics))
    models.append((work.latest.folder, "after", pair.now.metrics))
    for label, side, metrics in models:
        if label not in known and math.isfinite(metrics[metric]):
            costs = [getattr(one, side) for one in comparisons]
            points.append(
                {
                    "label": label,
                    "metric": metrics[metric],
                    "macs": costs[0].macs / max(comparisons[0].before.macs, 1),
                    "latency_ms": {str(c.latency.batch_size): c.latency.p50_ms for c in costs},
                }
            )
    return points


def _first_teacher(work: Work) -> str | None:
    """Return the recipe's teacher, else the last stage's that has one; the first of several."""
    named = [getattr(stage, "teacher", None) for stage in work.recipe.stages]
    given = (work.recipe.teacher, *reversed(named))
    return next((listed(one)[0] for one in given if one), None)


def _base(work: Work) -> Origin:
    if work.recipe.model is not None:
        return Origin.of_model(work.recipe.model)
    return Origin(f"{(work.recipe.model_config or {}).get('model_type')}{UNTRAINED}")


def _teacher(work: Work) -> Origin | None:
    """Return the teacher of the last stage that had one."""
    run = {str(work.manifest.folder / e.folder): e for e in work.manifest.stages}
    for stage in reversed(work.recipe.stages):
        if isinstance(stage, Distil | Recover) or (isinstance(stage, Cut) and stage.gradual):
            sources = listed(stage.teacher or work.recipe.teacher or work.whole)
            if len(sources) > 1:
                return Origin(f"the mean of {', '.join(sources)}")
            for source in sources:
                if source in run:
                    return Origin(
                        f"the model before its first cut, {run[source].folder} of this recipe"
                    )
                return Origin.of_model(source)
            return None
    return None


def _data(data: DataConfig) -> Origin:
    if data.dataset_name == DIGITS:
        return Origin("digits of scikit-learn", split=data.eval_split_name)
    if data.dataset_name and not Path(data.dataset_name).exists():
        config, split = data.dataset_config_name, data.eval_split_name
        if data.train_val_split is not None:
            split = f"{data.train_val_split:g} of {data.train_split_name}"
        return Origin(data.dataset_name, on_hub=True, config=config, split=split)
    local = data.dataset_name or data.train_file or data.train_dir or ""
    held = data.validation_file or data.validation_dir
    name = f"{Path(local).name}, local"
    return Origin(name, split=Path(held).name if held else data.eval_split_name)


def _structure(manifest: Manifest) -> list[dict[str, Any]]:
    cuts = [entry for entry in manifest.stages if entry.structure]
    if len(cuts) == 1:
        return cuts[0].structure
    return [{**row, "path": f"{e.folder}: {row['path']}"} for e in cuts for row in e.structure]


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    own = {k: v for k, v in settings.items() if k != "training" and v is not None}
    return {**own, **settings.get("training", {})}
