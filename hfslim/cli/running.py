"""`hfslim run`: run the stages of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hfslim.cli import options
from hfslim.cli.command import app, show, working


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: `hfslim run recipes/image/digits_vit.yaml --stages.prune.target.macs 0.4`",
)
def run(
    context: typer.Context,
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A YAML file, such as those in recipes/.")
    ],
    seeds: Annotated[
        int | None,
        typer.Option(
            min=2, help="Run this many seeds, and report mean, spread and worst of each figure."
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Run the stages of a recipe, such as transfer, prune, recover and measure.

    Every key of the recipe is an option too, nested by dots: `--training.learning_rate 3e-5`,
    `--stages.prune.target.macs=0.4`. A second run continues after the last finished stage. With
    `--seeds`, each seed has a folder `seed-N` in `output_dir`, beside the report on all seeds.

    For several processes: `accelerate launch recipes/compress.py RECIPE [--key value …]`.
    """
    with working():
        from hfslim.pipeline.manifest import FILE
        from hfslim.pipeline.recipe import load_recipe
        from hfslim.pipeline.runner import run as run_recipe
        from hfslim.pipeline.seeds import run_seeds
        from hfslim.reporting.report import Report

        loaded = load_recipe(recipe, context.args)
        if seeds is None:
            model = run_recipe(loaded)
        else:
            over = run_seeds(loaded, seeds)
    if seeds is not None:
        shown = {"output_dir": str(over), **Report.load(over).to_dict()}
        show(as_json, shown, f"report in {over}")
        return
    manifest = json.loads((Path(loaded.output_dir) / FILE).read_text(encoding="utf-8"))
    values = {"output_dir": loaded.output_dir, "model": str(model), **manifest}
    show(as_json, values, f"model in {model}")
