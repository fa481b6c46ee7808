"""`hfslim inspect`: the importance of units, and how a model differs from another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from hfslim.anatomy.structure import KINDS
from hfslim.cli import options
from hfslim.cli.command import app, asked, show, working

if TYPE_CHECKING:
    from hfslim.inspection.findings import Finding


@app.command(
    epilog="Example: `hfslim inspect bert-sst2 --data nyu-mll/glue "
    "--data dataset_config_name=sst2 --by-class --picture importance.svg`"
)
def inspect(
    model: options.Model,
    data: options.Data = None,
    criterion: options.CriterionNames = None,
    units: options.UnitKinds = None,
    by_class: Annotated[
        bool, typer.Option("--by-class", help="Also show which units each class needs.")
    ] = False,
    similarity: Annotated[
        bool, typer.Option("--similarity", help="Also show the similarity of the layers (CKA).")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|FILE",
            help="Another model, such as the teacher, or its `inspect --json`: show on which units "
            "the two agree, and which predictions changed from it to MODEL.",
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Also draw the results: a .svg, .png or .pdf file."),
    ] = None,
    max_examples: options.MaxExamples = 512,
    batch_size: options.BatchSize = 32,
    seed: options.Seed = 42,
    as_json: options.Json = False,
) -> None:
    """Show which heads, neurons and layers a model has, and how much each matters.

    Each bar is a unit, or the mean of a few neighbours; its height is the importance relative to
    the greatest of its kind. By default units are scored by `fisher` with `--data`, by `magnitude`
    without. Units that cannot be removed are listed with the reason.
    """
    names = options.criteria(criterion or (["fisher"] if data else ["magnitude"]))
    for option, given in (("--by-class", by_class), ("--similarity", similarity)):
        if given and not data:
            raise typer.BadParameter("it needs examples: add --data", param_hint=f"'{option}'")
    with working():
        from hfslim.anatomy.discovery import find_units
        from hfslim.inspection.subject import Subject, saved_scores
        from hfslim.pipeline.opening import open_classifier
        from hfslim.pruning.scores.criteria import criteria_by_kind
        from hfslim.reporting.plots import heat_maps

        if picture is not None:
            with asked("--picture"):
                heat_maps.check_picture(picture)
        saved = saved_scores(against) if against and against.endswith(".json") else None
        examples = options.open_examples(model, data, None, seed, batch_size) if data else None
        loaded = examples.load_model(model) if examples else open_classifier(model)[1]
        found = find_units(loaded, "dimensions" in (units or ()))
        kinds: Any = units or [k for k in KINDS if any(site.kind == k for site in found)]
        with asked("--units"):
            found = found.of(kinds)
        with asked("--criterion"):
            by_kind = criteria_by_kind(cast(Any, names), kinds)
        shown = sys.stderr.isatty()
        subject = Subject(loaded, found, by_kind, examples, by_class, max_examples, seed, shown)
        findings: list[Finding] = [subject.importance(f"{model}: {_listed(names)}")]
        if similarity:
            findings.append(subject.similarity())
        if against and saved is not None:
            findings.append(subject.compare_scores(against, saved))
        elif against:
            others = options.open_examples(against, data, None, seed, batch_size) if data else None
            findings += subject.compare_model(against, others)
        if picture is not None:
            heat_maps.draw_heat_maps([p for one in findings for p in one.panels()], picture, model)

    def draw_tables(console: Console) -> None:
        for finding in findings:
            finding.print(console)

    values: dict[str, Any] = {"model": model, "criterion": names}
    for finding in findings:
        values |= finding.values()
    show(as_json, values, draw_tables)


def _listed(names: str | dict[str, str]) -> str:
    if isinstance(names, str):
        return names
    return ", ".join(f"{kind} by {name}" for kind, name in names.items())
