"""`hfslim prune`: prune a model in one command."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfslim.cli import options
from hfslim.cli.command import app, show, working

if TYPE_CHECKING:
    from hfslim.pipeline.recipe import Recipe


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: `hfslim prune bert-sst2 --target macs=0.5 --data nyu-mll/glue "
    "--data dataset_config_name=sst2 --output bert-sst2-half`",
)
def prune(
    context: typer.Context,
    model: options.Model,
    target: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=VALUE",
            help="`macs=0.5`, `parameters=0.5` or `latency=0.5`, the fraction to keep; "
            "`sparsity=0.3` or `sparsity.heads=0.3`, the fraction of the units to remove.",
        ),
    ],
    data: options.GivenData,
    output: options.Output,
    units: options.UnitKinds = None,
    criterion: options.CriterionNames = None,
    max_examples: options.MaxExamples = 512,
    metric: options.Metric = None,
    seed: options.Seed = 42,
    as_json: options.Json = False,
) -> None:
    """Prune a trained model to a target.

    The command runs a recipe of the two stages `prune` and `measure`. Every other key of `prune`
    is an option too, such as `--schedule cubic --num_train_epochs 1` for gradual pruning while
    training. The folder contains the model, its processor, the report, the model card and the
    recipe, to which a `recover` stage can be added.
    """
    stage: dict[str, Any] = {"target": options.target(target), "max_examples": max_examples}
    stage |= {"units": units} if units else {}
    stage |= {"criterion": options.criteria(criterion)} if criterion else {}
    with working():
        from hfslim.pipeline.opening import task_of
        from hfslim.pipeline.recipe import override, parse_recipe
        from hfslim.pipeline.schema import RecipeError
        from hfslim.reporting.report import Report

        options.check_empty(output)
        raw: dict[str, Any] = {
            "task": task_of(model),
            "model": model,
            "data": options.data_section(data),
            "seed": seed,
            "training": {"report_to": "none"},
            "stages": [{"prune": stage}, {"measure": {}}],
        }
        raw |= {"metric": metric} if metric else {}
        override(raw, [re.sub("^--", "--stages.prune.", one) for one in context.args])
        try:
            parse_recipe({**raw, "output_dir": str(output)})
        except RecipeError as error:
            raise RecipeError(re.sub(r"^stages\[1\] prune[.:] ?", "--", str(error))) from None
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as work:
            _cut(parse_recipe({**raw, "output_dir": str(Path(work, "run"))}), output)
        report = Report.load(output)
    values = {"output": str(output), **report.to_dict()}
    show(as_json, values, f"model in {output}, report in {output / 'report.html'}")


def _cut(recipe: Recipe, output: Path) -> None:
    """Run the two stages, and move their results into one folder, also if the second fails."""
    from hfslim.hub.card import write_card
    from hfslim.pipeline.runner import run

    folder = Path(recipe.output_dir)
    model = folder / "01-prune"
    try:
        with _renamed({str(model): str(output), str(folder): str(output)}):
            run(recipe)
        _collect(recipe, model, output)
        write_card(output)
    except BaseException as error:
        if not _finished(folder) and not (output / "config.json").exists():
            raise
        if model.exists():
            _collect(recipe, model, output)
        text = f"{error}: the cut model is finished, and kept in {output}"
        raise RuntimeError(text.replace(str(folder), str(output))) from error


def _finished(folder: Path) -> bool:
    """Return whether the manifest of a run says that its first stage is finished."""
    from hfslim.pipeline.manifest import FILE

    file = folder / FILE
    stages = json.loads(file.read_text(encoding="utf-8"))["stages"] if file.exists() else []
    return bool(stages) and stages[0]["finished"]


def _collect(recipe: Recipe, model: Path, output: Path) -> None:
    """Move the model with its recipe, report and page, as far as they were written."""
    from hfslim.hub.card import RECIPE

    again = replace(recipe, output_dir=f"outputs/{output.name}")
    with suppress(OSError):
        (model / RECIPE).write_text(again.to_yaml(), encoding="utf-8")
    for path in (*model.parent.glob("*-measure/*"), *model.parent.glob("report.*")):
        path.replace(model / path.name)
    for path in model.parent.glob("figures"):
        path.replace(model / path.name)
    if output.exists():
        output.rmdir()
    model.rename(output)


@contextmanager
def _renamed(folders: dict[str, str]) -> Iterator[None]:
    """Log the folders to which results are moved in place of those where they are made."""

    def rename(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        for made, moved in folders.items():
            text = re.sub(rf"{re.escape(made)}(/\d\d-measure)?", moved, text)
        record.msg, record.args = text, ()
        return True

    handlers = logging.getLogger().handlers
    for one in handlers:
        one.addFilter(rename)
    try:
        yield
    finally:
        for one in handlers:
            one.removeFilter(rename)
