"""`hfslim report`, `hfslim card`, `hfslim push` and `hfslim families`: reports and sharing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from hfslim.cli import options
from hfslim.cli.command import app, asked, show, working

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfslim.anatomy.coverage import Coverage

TASKS = ("text", "image", "audio")
SPEECH = {"speech": "audio"}
Saved = Annotated[
    Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help="A saved model.")
]


@app.command(epilog="Example: `hfslim card bert-sst2-half --name you/bert-sst2-half`")
def card(
    folder: Saved,
    name: Annotated[str | None, typer.Option(help="Hub id that the card's examples load.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also if README.md is not a card of hfslim.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Write the model card, README.md, from the report beside the model.

    The text below the marker of an earlier card, and metadata such as `license`, are kept. A
    README.md without the marker is left alone; with `--force` its text goes below the new card.
    """
    from hfslim.hub.edits import check_own

    if not force:
        check_own(folder)
    with working():
        from hfslim.hub.card import write_card

        path = write_card(folder, name=name)
    show(as_json, {"card": str(path)}, str(path))


@app.command(epilog="Example: `hfslim push bert-sst2-half you/bert-sst2-half --private`")
def push(
    folder: Saved,
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="Hub id; created if it does not exist.")
    ],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Visibility of a new repository; else the Hub's default."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; else `main`.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str, typer.Option(help="First line of the commit.")] = "Upload model",
    as_json: options.Json = False,
) -> None:
    """Push a saved model to the Hub, with its card, report and recipe, in one commit.

    Log in with `hf auth login`, or set `HF_TOKEN`. A failed push can be repeated.
    """
    with working():
        from huggingface_hub.utils import validate_repo_id

        from hfslim.hub.push import push as push_folder

        with asked("REPO"):
            validate_repo_id(repo)
        commit = push_folder(
            folder,
            repo,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=message,
        )
    values = {"repo": repo, "commit": commit.oid, "url": str(commit.commit_url)}
    show(as_json, values, str(commit.commit_url))


@app.command(epilog="Example: `hfslim report outputs/digits_vit`")
def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", exists=True, file_okay=False, help="The folder of a report.json."
        ),
    ],
    as_json: options.Json = False,
) -> None:
    """Write report.html, one self-contained page, and its figures as PNG files.

    A run writes them too; this command makes them again from `report.json` alone.
    """
    with working():
        from hfslim.reporting.page import write_page
        from hfslim.reporting.report import Report

        path = write_page(Report.load(folder), folder)
    show(as_json, {"report": str(path)}, str(path))


@app.command(epilog="Example: `hfslim families --task image`")
def families(
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="|".join(TASKS),
            help="Show only these tasks; `speech` is audio.",
            callback=options.one_of((*TASKS, *SPEECH)),
            autocompletion=lambda: list(TASKS),
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show what can be removed from each model type of transformers.

    The table comes from building and pruning a model of each type: `yes` means that the pruned
    model equals the masked one, `refused` that the cut cannot be exact. `hfslim inspect MODEL`
    shows the reasons for any model.
    """
    task = [SPEECH.get(one, one) for one in task or TASKS]
    with working():
        from hfslim.anatomy.coverage import coverage

        rows = coverage(task)
        for one in sorted({*task} - {row.task for row in rows}):
            print(f"{one}: no type is in the table yet; `hfslim inspect MODEL` shows any model")
    values = {"families": [asdict(row) for row in rows]}
    show(as_json, values, _table(rows))


def _table(rows: Sequence[Coverage]) -> Table:
    from hfslim.anatomy.coverage import COLUMNS, SIGNS

    table = Table("task", "type", *COLUMNS, "plain reload")
    for row in rows:
        signs = (SIGNS[row.outcomes[kind]] for kind in COLUMNS)
        table.add_row(row.task, row.model_type, *signs, ", ".join(row.plain))
    return table
