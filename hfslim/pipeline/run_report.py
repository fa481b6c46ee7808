"""The report of a run's current model, from the records of its stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from hfslim.anatomy.weights import zeros_of
from hfslim.distillation import DistillationConfig
from hfslim.distillation.teacher.teacher import load_teacher
from hfslim.measuring.measurement import Comparison
from hfslim.pipeline.manifest import StageRecord
from hfslim.pipeline.opening import sources_of
from hfslim.pipeline.task_examples import Evaluation
from hfslim.reporting.provenance import Machine, Origin, Provenance
from hfslim.reporting.report import REPORT, Quality, Report
from hfslim.tasks import DataConfig
from hfslim.tasks.data import DIGITS

if TYPE_CHECKING:
    from hfslim.pipeline.run_state import RunState

__all__ = ["Pair", "current_report", "evaluate_pair", "run_report"]

UNTRAINED = ", untrained"


class Pair(NamedTuple):
    """The current model, the model that it is compared with, and the evaluation of both.

    Attributes:
        after: The current model.
        before: The model before its first cut, else a teacher; None if there is neither.
        processor: The own processor of `before`; None if it takes the current model's inputs.
        evaluation: The evaluation of `after`.
        before_evaluation: The evaluation of `before`.
    """

    after: PreTrainedModel
    before: PreTrainedModel | None
    processor: Any
    evaluation: Evaluation
    before_evaluation: Evaluation | None


def evaluate_pair(state: RunState) -> Pair:
    """Load and evaluate the current model and the one before it; every process calls this."""
    after = state.task.auto_model.from_pretrained(state.source)
    evaluation = state.evaluate(after)
    source = state.whole or _first_teacher(state)
    if source is None:
        return Pair(after, None, None, evaluation, None)
    processor = None if state.whole else state.own_processor(source)
    before = load_teacher(source, after, allow_untrained=True)
    if state.whole:
        state.rename(before)
    return Pair(after, before, processor, evaluation, state.evaluate(before, processor))


def run_report(state: RunState, pair: Pair, comparisons: Sequence[Comparison] = ()) -> Report:
    """Return the report of the current model, with measured costs if there are comparisons."""
    recipe, records, count = state.recipe, state.manifest.stages, len(state.eval)
    metric = state.metric
    teacher = None if pair.before_evaluation is None else pair.before_evaluation.metrics[metric]
    value = pair.evaluation.metrics[metric]
    losses = {
        name: args.objective if isinstance(args, DistillationConfig) else "loss_hard"
        for name, args in state.arguments.items()
    }
    base, answers = _base(state), state.answers(pair.evaluation, pair.before_evaluation)
    return Report(
        # The base model was untrained; this one is not.
        model=base.name.removesuffix(UNTRAINED),
        comparisons=comparisons,
        quality=[Quality(metric, value, teacher, state.stated_data, count, (recipe.seed,))],
        structure=_structure(records),
        stages=[{one.name: _flat(one.settings)} for one in recipe.stages],
        weight_sparsity=zeros_of(pair.after),
        answers=answers,
        warnings=answers.hidden() if answers else (),
        curve=_curve(state, pair, comparisons),
        units=[{"stage": record.folder, **row} for record in records for row in record.units],
        history=[
            {
                "stage": record.folder,
                "steps": record.steps,
                "series": record.series,
                "metrics": {k: v for k, v in record.metrics.items() if math.isfinite(v)},
            }
            for record in records
            if record.metrics
        ],
        provenance=Provenance(
            task=recipe.task,
            base=base,
            teacher=_teacher(state),
            data=_data(recipe.data),
            losses=losses,
            seeds=(recipe.seed,),
            processes=PartialState().num_processes,
            machine=Machine.here(),
        ),
    )


def current_report(state: RunState) -> Report:
    """Return the report of the current model: the one that a stage has made, or a new one.

    Every process calls this.
    """
    # The first process measures, and where machines share no folder it alone has the report.
    made = _saved_report(state) if PartialState().is_main_process else None
    return broadcast_object_list([made])[0] or run_report(state, evaluate_pair(state))


def _saved_report(state: RunState) -> Report | None:
    """Return the report of a stage that ran after the current model was made."""
    for record in reversed(state.manifest.stages):
        if record is state.latest:
            break
        if (state.folder_of(record) / REPORT).exists():
            return Report.load(state.folder_of(record))
    return None


def _curve(
    state: RunState, pair: Pair, comparisons: Sequence[Comparison]
) -> list[Mapping[str, Any]]:
    """Return the points of the models measured so far, and of the current one before recovery."""
    points: dict[str, Mapping[str, Any]] = {}
    if not comparisons or pair.before_evaluation is None or state.latest is None:
        return []
    metric, records = state.metric, state.manifest.stages
    for record in records:
        if record.finished and (state.folder_of(record) / REPORT).exists():
            earlier = Report.load(state.folder_of(record)).curve
            points |= {point["label"]: point for point in earlier}
    cut = next((r for r in reversed(records) if r.structure and r is not state.latest), None)
    before = "whole model" if state.whole else "teacher"
    models = [(before, "before", pair.before_evaluation.metrics)]
    if cut is not None:
        models.append((cut.folder, "after", cut.metrics))
    models.append((state.latest.folder, "after", pair.evaluation.metrics))
    for label, side, metrics in models:
        if label not in points and math.isfinite(metrics[metric]):
            costs = [getattr(one, side) for one in comparisons]
            points[label] = {
                "label": label,
                "metric": metrics[metric],
                "macs": costs[0].macs / max(comparisons[0].before.macs, 1),
                "latency_ms": {str(c.latency.batch_size): c.latency.p50_ms for c in costs},
            }
    return [*points.values()]


def _first_teacher(state: RunState) -> str | None:
    """Return the recipe's teacher, else that of the last stage that names one."""
    named = [stage.named_teachers for stage in state.recipe.stages]
    given = (sources_of(state.recipe.teacher), *reversed(named))
    return next((sources[0] for sources in given if sources), None)


def _base(state: RunState) -> Origin:
    if state.recipe.model is not None:
        return Origin.of_model(state.recipe.model)
    return Origin(f"{(state.recipe.model_config or {}).get('model_type')}{UNTRAINED}")


def _teacher(state: RunState) -> Origin | None:
    """Return the teacher of the last stage that has one."""
    stage = next((one for one in reversed(state.recipe.stages) if one.taught), None)
    sources = sources_of(state.recipe.teacher or state.whole)
    sources = () if stage is None else stage.named_teachers or sources
    if not sources:
        return None
    if len(sources) > 1:
        return Origin(f"the mean of {', '.join(sources)}")
    for record in state.manifest.stages:
        if sources[0] == str(state.folder_of(record)):
            return Origin(f"the model before its first cut, {record.folder} of this recipe")
    return Origin.of_model(sources[0])


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


def _structure(records: Sequence[StageRecord]) -> list[dict[str, Any]]:
    cuts = [record for record in records if record.structure]
    if len(cuts) == 1:
        return cuts[0].structure
    return [
        {**row, "path": f"{one.folder}: {row['path']}"} for one in cuts for row in one.structure
    ]


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    own = {k: v for k, v in settings.items() if k != "training" and v is not None}
    return {**own, **settings.get("training", {})}
