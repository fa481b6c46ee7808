"""`hfslim prune`: a smaller model in one command."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfslim.cli.app import app, show, working
from hfslim.cli.options import (
    CriterionNames,
    GivenData,
    Json,
    MaxExamples,
    Metric,
    Model,
    Output,
    Seed,
    UnitKinds,
    check_empty,
    criteria,
    data_section,
    pairs,
)

if TYPE_CHECKING:
    from hfslim.pipeline.recipe import Recipe


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: `hfslim prune bert-sst2 --target macs=0.5 --data nyu-mll/glue "
    "--data dataset_config_name=sst2 --output bert-sst2-half`",
)
def prune(
    context: typer.Context,
    model: Model,
    target: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=VALUE",
            help="`macs=0.5`, `parameters=0.5` or `latency=0.5`, the fraction to keep; "
            "`sparsity=0.3` or `sparsity.heads=0.3`, the fraction of the units to remove.",
        ),
    ],
    data: GivenData,
    output: Output,
    units: UnitKinds = None,
    criterion: CriterionNames = None,
    max_examples: MaxExamples = 512,
    metric: Metric = None,
    seed: Seed = 42,
    as_json: Json = False,
) -> None:
    """Cut a trained model to a target.

    This is a recipe of the two stages `prune` and `measure`; any other key of `prune` can be set
    behind it, such as `--schedule cubic --num_train_epochs 1`, which trains while it cuts. The
    folder gets the model, its processor, the report, the model card and the recipe, to which a
    `recover` stage can be added.
    """
    stage: dict[str, Any] = {"target": pairs(target, "--target"), "max_examples": max_examples}
    stage |= {"units": units} if units else {}
    stage |= {"criterion": criteria(criterion)} if criterion else {}
    with working(result_follows=as_json):
        from hfslim.pipeline.opening import task_of
        from hfslim.pipeline.recipe import override, parse_recipe
        from hfslim.reporting.report import Report

        check_empty(output)
        raw: dict[str, Any] = {
            "task": task_of(model),
            "model": model,
            "data": data_section(data),
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
    show(as_json, values, lambda console: console.print(f"model in {output}", markup=False))


def _cut(recipe: Recipe, output: Path) -> None:
    """Run the two stages, and put what they leave into one folder."""
    from hfslim.hub.card import RECIPE, write_card
    from hfslim.pipeline.recipe import recipe_yaml
    from hfslim.pipeline.runner import run

    model = run(recipe)
    for path in Path(recipe.output_dir).glob("*-measure/*"):
        path.rename(model / path.name)
    again = replace(recipe, output_dir=f"outputs/{output.name}")
    (model / RECIPE).write_text(recipe_yaml(again), encoding="utf-8")
    if output.exists():
        output.rmdir()
    model.rename(output)
    write_card(output)
