"""`hfslim prune`: prune a model in one command."""

from __future__ import annotations

import re
import tempfile
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
    stage: dict[str, Any] = {
        "target": options.pairs(target, "--target"),
        "max_examples": max_examples,
    }
    stage |= {"units": units} if units else {}
    stage |= {"criterion": options.criteria(criterion)} if criterion else {}
    with working(result_follows=as_json):
        from hfslim.pipeline.opening import task_of
        from hfslim.pipeline.recipe import override, parse_recipe
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
        parse_recipe({**raw, "output_dir": str(output)})
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as work:
            _cut(parse_recipe({**raw, "output_dir": str(Path(work, "run"))}), output)
        report = Report.load(output)
    values = {"output": str(output), **report.to_dict()}
    show(as_json, values, f"model in {output}")


def _cut(recipe: Recipe, output: Path) -> None:
    """Run the two stages, and move their results into one folder."""
    from hfslim.hub.card import RECIPE, write_card
    from hfslim.pipeline.runner import run

    model = run(recipe)
    for path in Path(recipe.output_dir).glob("*-measure/*"):
        path.rename(model / path.name)
    again = replace(recipe, output_dir=f"outputs/{output.name}")
    (model / RECIPE).write_text(again.to_yaml(), encoding="utf-8")
    if output.exists():
        output.rmdir()
    model.rename(output)
    write_card(output)
