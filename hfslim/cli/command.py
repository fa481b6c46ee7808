"""The command, and what all verbs share: errors, exit codes and output."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from typer.core import TyperGroup

VERBS = (
    *("run", "inspect", "prune", "measure", "compare"),
    *("report", "export", "card", "push", "families"),
)
DEBUG = "HFSLIM_DEBUG"
PIPED_WIDTH = 120

T = TypeVar("T")


class Verbs(TyperGroup):
    """The verbs, listed in the order of `VERBS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the verbs."""
        return sorted(super().list_commands(ctx), key=VERBS.index)


app = typer.Typer(
    name="hfslim",
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from hfslim import __version__

        print(__version__)
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 done, 1 tried and failed, 2 asked wrongly. Results go to standard "
    "output, everything else to standard error. `hfslim VERB --help` has an example of each verb."
)
def hfslim(
    debug: Annotated[
        bool, typer.Option("--debug", envvar=DEBUG, help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make transformers classifiers smaller and faster, for text, images and speech."""
    if debug:
        os.environ[DEBUG] = "1"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the process's arguments or others, and exit with its code."""
    if not sys.stderr.isatty():
        # tqdm reads this when it is imported, which is later.
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        code = app(arguments, prog_name="hfslim", standalone_mode=False)
    except typer.Abort:
        sys.exit(1)
    except typer.TyperException as error:
        _fail(error.format_message(), error.exit_code)
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        from hfslim.pipeline.schema import RecipeError

        wrong = isinstance(error, RecipeError | FileNotFoundError)
        _fail(_one_line(error), 2 if wrong else 1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    if message:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ImportError) and "timm" in text:
        return "a model of timm needs timm and torchvision: pip install 'hfslim[timm]'"
    if isinstance(error, ValueError | OSError | RuntimeError) and text:
        return text
    return f"{type(error).__name__}: {text} ({DEBUG}=1 shows where)"


@contextmanager
def working() -> Iterator[None]:
    """Log and print on standard error inside the block: the result follows it."""
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hfslim").setLevel(logging.INFO if first else logging.WARNING)
    with redirect_stdout(sys.stderr):
        yield


def progress(items: Iterable[T], doing: str) -> Iterable[T]:
    """Yield the items, with a progress bar if standard error is a terminal."""
    console = Console(stderr=True)
    return track(items, doing, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def asked(option: str) -> Iterator[None]:
    """Raise a `ValueError` inside the block as a `BadParameter` of an option."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"'{option}'") from error


def show(
    as_json: bool, values: Mapping[str, Any], shown: str | Table | Callable[[Console], None]
) -> None:
    """Print a result on standard output: as JSON, or a text, a table or what a function draws."""
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else PIPED_WIDTH)
    if as_json:
        print(json.dumps(values, indent=2 if terminal else None, allow_nan=False))
    elif callable(shown):
        shown(console)
    else:
        console.print(shown, markup=not isinstance(shown, str))
