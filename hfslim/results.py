"""What a run tells of its model: the report, from what the stages left behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from hfslim.distill import DistillationConfig
from hfslim.manifest import Manifest
from hfslim.measure import Comparison
from hfslim.provenance import Machine, Origin, Provenance
from hfslim.prune.weights import zeros_of
from hfslim.report import REPORT, Quality, Report
from hfslim.stages import Cut, Distil, Measure, Recover, listed
from hfslim.tasks import DataConfig
from hfslim.tasks.data import DIGITS
from hfslim.work import Work

__all__ = ["Metrics", "final_report", "known_metrics", "run_report"]

Metrics = Mapping[str, float]


def known_metrics(work: Work, source: str | None) -> Metrics:
    """Return the metrics of a model that a stage left; empty if none did."""
    folders = {str(work.manifest.folder / e.folder): e.metrics for e in work.manifest.stages}
    return folders.get(str(source), {})


def run_report(
    work: Work,
    model: PreTrainedModel,
    comparisons: Sequence[Comparison] = (),
    now: Metrics | None = None,
    before: Metrics | None = None,
) -> Report:
    """Report on the current model.

    Args:
        work: The run.
        model: The current model, loaded.
        comparisons: The model before its first cut and now, measured.
        now: Metrics of the current model; by default those that its stage left.
        before: Metrics of the model before its first cut; likewise.
    """
    recipe = work.recipe
    now = known_metrics(work, work.source) if now is None else now
    before = known_metrics(work, work.whole) if before is None else before
    quality = []
    if recipe.metric in now:
        seeds, count = (recipe.seed,), len(work.eval)
        data = f"evaluation, {count:,} examples"
        value, teacher = now[recipe.metric], before.get(recipe.metric)
        quality.append(Quality(recipe.metric, value, teacher, data, count, seeds))
    losses = {
        name: args.objective if isinstance(args, DistillationConfig) else "loss_hard"
        for name, args in work.arguments.items()
    }
    base = _base(work)
    return Report(
        model=base.name,
        comparisons=comparisons,
        quality=quality,
        structure=_structure(work.manifest),
        stages=[{one.name: _flat(one.settings)} for one in recipe.stages],
        weight_sparsity=zeros_of(model),
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


def final_report(work: Work, model: PreTrainedModel) -> Report:
    """Return the report of the last `measure` stage, if the model is still the one it measured."""
    for entry in reversed(work.manifest.stages):
        if entry is work.latest:
            break
        if entry.name == Measure.name and (work.manifest.folder / entry.folder / REPORT).exists():
            return Report.load(work.manifest.folder / entry.folder)
    return run_report(work, model)


def _base(work: Work) -> Origin:
    if work.recipe.model is not None:
        return Origin.of_model(work.recipe.model)
    return Origin(f"{(work.recipe.model_config or {}).get('model_type')}, untrained")


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
