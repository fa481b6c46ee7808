"""The model card: cost, quality and origin of a compressed model, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants

from hfslim.hub.edits import CARD, MARKER, merge
from hfslim.hub.saved_model import SavedModel
from hfslim.reporting import sparsity_text
from hfslim.reporting.plots.maps import draw_structure
from hfslim.reporting.provenance import Origin, Provenance
from hfslim.reporting.report import REPORT, Report
from hfslim.reporting.tables import NOT_MEASURED, cost_rows, markdown_table

__all__ = ["PICTURE", "RECIPE", "write_card"]

PICTURE, RECIPE = "structure.png", "recipe.yaml"
NOT_STATED = "not stated"
TEMPLATE = Path(__file__).with_name("card.md.jinja")
NOTICE = "<!-- hfslim writes this card anew at each push, down to the line that it marks below. -->"


def write_card(
    folder: str | Path,
    report: Report | None = None,
    *,
    name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write the model card of a folder, and the picture of the structure beside it.

    All figures come from the report. The text below `MARKER` in an earlier card is kept, with
    metadata (such as `license` and `language`) that hfslim does not write; a card without the
    marker is kept whole, below it.

    Args:
        folder: The folder of a saved model.
        report: Its report; by default the folder's `report.json`, or none.
        name: The Hub id in the examples; by default the folder.
        metadata: Further metadata of the card, such as `license`, `language` and `tags`.

    Returns:
        The card's path.

    Raises:
        CardError: The folder holds no saved model.
        ValueError: `report.json` is damaged.
    """
    folder = Path(folder)
    saved = SavedModel.read(folder)
    if report is None and (folder / REPORT).exists():
        report = Report.load(folder)
    report = report or Report(model=name or folder.name)
    if report.structure:
        draw_structure(report.structure, folder / PICTURE)
    card = _render(folder, saved, report, name or str(folder), metadata or {})
    path = folder / CARD
    earlier = [path.read_text(encoding="utf-8-sig")] if path.exists() else []
    path.write_text(merge(card, *earlier), encoding="utf-8")
    return path


def _render(
    folder: Path, saved: SavedModel, report: Report, name: str, metadata: Mapping[str, Any]
) -> str:
    processes = report.provenance.processes
    launch = f"accelerate launch --num_processes {processes} recipes/compress.py"
    card = ModelCard.from_template(
        _metadata(saved, report, name),
        template_path=str(TEMPLATE),
        notice=NOTICE,
        marker=MARKER,
        title=name.rstrip("/").rpartition("/")[2],
        summary=_summary(saved, report),
        picture=PICTURE if report.structure else None,
        figures=markdown_table(("", "before", "after", "change"), cost_rows(report.comparisons)),
        conditions=report.measurement_conditions(),
        machine=str(report.provenance.machine or NOT_MEASURED),
        quality=_quality(report),
        answers=[section.to_markdown(level=3) for section in report.answer_sections()],
        loading=saved.loading_examples(name),
        pruned=saved.pruned,
        origins=_origins(report),
        stages=report.stage_lines(),
        recipe=RECIPE if (folder / RECIPE).exists() else None,
        command=f"{launch if processes > 1 else 'hfslim run'} {RECIPE}",
        structure=[section.to_markdown() for section in report.structure_sections()],
        limits=_limits(report),
    )
    card.text = re.sub(r"\n{3,}", "\n\n", card.text)
    for key, value in metadata.items():
        old = card.data.get(key)
        card.data[key] = list(dict.fromkeys([*old, *value])) if isinstance(old, list) else value
    return str(card)


def _metadata(saved: SavedModel, report: Report, name: str) -> ModelCardData:
    made = report.provenance
    task = made.task or saved.task
    stages = {stage for one in report.stages for stage in one}
    tags = ["hfslim"]
    if saved.pruned or report.structure or report.weight_sparsity or "prune" in stages:
        tags.append("pruned")
    if made.teacher:
        tags.append("distilled")
    data = made.data
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=data.name if data and data.on_hub else "local",
            dataset_name=data.name if data else quality.data,
            dataset_config=data.config if data else None,
            dataset_split=data.split if data else None,
            dataset_revision=data.revision if data else None,
            metric_type=quality.metric,
            metric_name=quality.metric,
            metric_value=quality.value,
        )
        for quality in report.quality
        if quality.value == quality.value
    ]
    on_hub = made.base is not None and made.base.on_hub
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        base_model=made.base.name if made.base and on_hub else None,
        base_model_relation="finetune" if on_hub else None,
        datasets=[data.name] if data and data.on_hub else None,
        metrics=[quality.metric for quality in report.quality] or None,
        tags=[*tags, *([task] if task else [])],
        model_name=name.rstrip("/").rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def _summary(saved: SavedModel, report: Report) -> str:
    made = report.provenance
    kind = (made.task or saved.task or "model").replace("-", " ")
    base = _link(made.base) if made.base else f"`{saved.config.get('model_type', 'unknown')}`"
    done = "compressed" if saved.pruned or report.stages or report.structure else "described"
    for one in report.comparisons[:1]:
        share = one.after.macs / one.before.macs if one.before.macs else 1
        done = f"cut to {share:.1%} of its multiply-accumulates"
    taught = ", and distilled from the teacher named below" if made.teacher else ""
    sparse = report.weight_sparsity
    layers = sparsity_text.summary(sparse) if sparse else "Its layers are dense."
    return f"A model for {kind}: {base}, {done} with hfslim{taught}. {layers}"


def _quality(report: Report) -> str:
    headings = ("metric", "data", "before", "after", "difference", "n", "seeds")
    rows = []
    for quality in report.quality:
        count = NOT_MEASURED if quality.examples is None else f"{quality.examples:,}"
        seeds = ", ".join(map(str, quality.seeds)) or NOT_MEASURED
        rows.append((quality.metric, quality.data, *quality.cells(), count, seeds))
    return markdown_table(headings, rows or [(NOT_MEASURED,) * len(headings)])


def _origins(report: Report) -> str:
    made = report.provenance
    blank = NOT_STATED if made == Provenance() else "none"
    stages = [(name, settings) for stage in report.stages for name, settings in stage.items()]
    criteria = [
        f"{number}. {name}: {settings['criterion']}"
        for number, (name, settings) in enumerate(stages, 1)
        if "criterion" in settings
    ]
    losses = [f"{stage}: {loss}" for stage, loss in made.losses.items()]
    rows = [
        ("base model", _link(made.base) if made.base else NOT_STATED),
        ("teacher", _link(made.teacher) if made.teacher else blank),
        ("data", _link(made.data, "datasets/") if made.data else NOT_STATED),
        ("importance criterion", "; ".join(criteria) or blank),
        ("loss", "; ".join(losses) or blank),
    ]
    return markdown_table(("", ""), rows)


def _link(origin: Origin, kind: str = "") -> str:
    if not origin.on_hub:
        return str(origin)
    address = f"{constants.ENDPOINT}/{kind}{origin.name}"
    rest = str(origin).removeprefix(origin.name)
    return f"[{origin.name}]({address}){rest}"


def _limits(report: Report) -> list[str]:
    calibration = "" if report.answers else ", calibration"
    limits = [
        "Labels, biases and licence conditions of the base model and of the data apply.",
        f"Robustness{calibration} and fairness after compression: not measured.",
    ]
    if report.comparisons:
        limits.append("Times hold for the stated machine, input and number of threads.")
    return limits + [
        f"The {quality.metric} is that of one run (seed {quality.seeds[0]}): its variation from "
        "seed to seed is not measured."
        for quality in report.quality
        if len(quality.seeds) == 1
    ]
