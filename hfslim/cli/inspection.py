"""`hfslim inspect`: what can be removed from a model, and how much each unit matters."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hfslim.cli.app import app, asked, show, working
from hfslim.cli.options import (
    BatchSize,
    CriterionNames,
    Data,
    Json,
    MaxExamples,
    Model,
    Seed,
    UnitKinds,
    criteria,
    open_model,
    workbench,
)
from hfslim.structure import KINDS

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from hfslim.anatomy import Units
    from hfslim.prune.gates import Key

BARS = "▁▂▃▄▅▆▇█"
BAR_COLUMNS = 24


@app.command(
    epilog="Example: `hfslim inspect bert-sst2 --data nyu-mll/glue "
    "--data dataset_config_name=sst2 --picture importance.svg`"
)
def inspect(
    model: Model,
    data: Data = None,
    criterion: CriterionNames = None,
    units: UnitKinds = None,
    picture: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Also draw the importance: a .svg, .png or .pdf file."),
    ] = None,
    max_examples: MaxExamples = 512,
    batch_size: BatchSize = 32,
    seed: Seed = 42,
    as_json: Json = False,
) -> None:
    """Show which heads, neurons and layers a model has, and how much each matters.

    Each bar is a unit, or the mean of a few neighbours; its height is the importance beside the
    greatest of its kind. Units are scored by `fisher` with `--data`, by `magnitude` without. What
    cannot be removed is listed with the reason.
    """
    names = criteria(criterion or (["fisher"] if data else ["magnitude"]))
    with working():
        from hfslim.anatomy import find_units
        from hfslim.prune.batches import Batches
        from hfslim.prune.criteria import criteria_by_kind
        from hfslim.prune.oneshot import calibrate

        if picture is not None:
            from hfslim.heatmap import check_picture

            with asked("--picture"):
                check_picture(picture)
        if data:
            bench = workbench(model, data, None, seed, batch_size)
            loaded = bench.load_model(model)
            batches: Iterable[Any] = bench.calibration(loaded, max_examples)
        else:
            _, loaded = open_model(model)
            batches = []
        found = find_units(loaded)
        kinds: Any = units or [k for k in KINDS if any(site.kind == k for site in found)]
        with asked("--units"):
            found = found.of(kinds)
        with asked("--criterion"):
            by_kind = criteria_by_kind(cast(Any, names), kinds)
        shown = sys.stderr.isatty()
        known = Batches(batches, max_examples)
        scores = calibrate(loaded, found, known, by_kind, seed, shown, "none").scores
        if picture is not None:
            from hfslim.heatmap import draw_importance

            draw_importance(scores, picture, f"{model}: {_spoken(names)}")
    rows = [
        {
            "kind": site.kind,
            "path": site.path,
            "units": site.size,
            "fixed": list(site.fixed),
            "scores": scores[site.kind, site.path].tolist(),
        }
        for site in found
    ]
    refused = [vars(refusal) for refusal in found.refusals]
    values = {"model": model, "criterion": names, "units": rows, "refused": refused}
    show(
        as_json,
        values,
        lambda console: console.print(_table(found, scores, f"{model}: {_spoken(names)}")),
    )


def _spoken(names: str | dict[str, str]) -> str:
    if isinstance(names, str):
        return names
    return ", ".join(f"{kind} by {name}" for kind, name in names.items())


def _table(units: Units, scores: Mapping[Key, torch.Tensor], title: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for heading in ("units", "layer", "number", "share", "importance", "least important"):
        table.add_column(heading, justify="right" if heading in ("number", "share") else "left")
    totals, highest = dict[str, float](), dict[str, float]()
    for (kind, _), values in scores.items():
        totals[kind] = totals.get(kind, 0.0) + values.sum().item()
        highest[kind] = max(highest.get(kind, 0.0), _columns(values).max().item())
    for site in units:
        values = scores[site.kind, site.path]
        share = values.sum().item() / totals[site.kind] if totals[site.kind] else 0.0
        least = [i for i in values.argsort(stable=True).tolist() if i not in site.fixed][:3]
        table.add_row(
            site.kind,
            escape(site.path),
            str(site.size),
            f"{share:.1%}",
            _bars(_columns(values), highest[site.kind]),
            ", ".join(map(str, least)),
        )
    for refusal in units.refusals:
        table.add_row(refusal.kind, escape(refusal.path), "–", "–", escape(refusal.reason), "")
    return table


def _columns(values: torch.Tensor) -> torch.Tensor:
    """Return the values themselves, or the means of neighbours where they are too many."""
    import torch

    return torch.stack([part.mean() for part in values.tensor_split(min(BAR_COLUMNS, len(values)))])


def _bars(values: torch.Tensor, highest: float) -> str:
    if not highest:
        return BARS[0] * len(values)
    heights = (values / highest * (len(BARS) - 1)).round().int().clamp(0, len(BARS) - 1)
    return "".join(BARS[height] for height in heights)
