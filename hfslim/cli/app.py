"""The command itself: what all verbs share in errors, exit codes and output."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import track
from typer.core import TyperGroup

VERBS = (
    *("run", "inspect", "prune", "measure", "compare"),
    *("report", "export", "card", "push", "families"),
)
DEBUG = "HFSLIM_DEBUG"
PIPED_WIDTH = 120

T = TypeVar("T")


class Verbs(TyperGroup):
    """The verbs, listed in the order of the work rather than that of their modules."""

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
    """Run the command, and end the process with its exit code.

    Args:
        arguments: What stands behind `hfslim`; the process's own arguments if not given.
    """
    if not sys.stderr.isatty():
        # Read by tqdm when it is imported, which is later than this.
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        code = app(arguments, prog_name="hfslim", standalone_mode=False)
    except typer.Abort:
        sys.exit(1)
    except typer.TyperException as error:
        sys.exit(_told(error.format_message(), error.exit_code))
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        sys.exit(_told(_in_a_line(error), _exit_code(error)))
    sys.exit(code if isinstance(code, int) else 0)


def _told(message: str, code: int) -> int:
    if message:
        print(f"error: {message}", file=sys.stderr)
    return code


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ImportError) and "timm" in text:
        return "a model of timm needs timm and torchvision: pip install 'hfslim[timm]'"
    if isinstance(error, ValueError | OSError | RuntimeError) and text:
        return text
    return f"{type(error).__name__}: {text} ({DEBUG}=1 shows where)"


def _exit_code(error: Exception) -> int:
    from hfslim.pipeline.schema import RecipeError

    return 2 if isinstance(error, RecipeError | FileNotFoundError) else 1


@contextmanager
def working(result_follows: bool = True) -> Iterator[None]:
    """Tell on standard error what is being done.

    Args:
        result_follows: Whether the result is printed afterwards, so that whatever the work itself
            prints is kept out of standard output.
    """
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hfslim").setLevel(logging.INFO if first else logging.WARNING)
    with redirect_stdout(sys.stderr if result_follows else sys.stdout):
        yield


def progress(items: Iterable[T], doing: str) -> Iterable[T]:
    """Yield the items, with a bar on a terminal and nothing elsewhere."""
    console = Console(stderr=True)
    return track(items, doing, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def asked(option: str) -> Iterator[None]:
    """Take a `ValueError` inside as a wrong value of an option.

    Raises:
        BadParameter: There was one.
    """
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"'{option}'") from error


def show(as_json: bool, values: Mapping[str, Any], draw: Callable[[Console], None]) -> None:
    """Print a result on standard output.

    Args:
        as_json: Whether for a program to read.
        values: The result as plain values.
        draw: Prints it for a person.
    """
    if as_json:
        print(json.dumps(values, indent=2 if sys.stdout.isatty() else None, allow_nan=False))
    else:
        draw(Console(width=None if sys.stdout.isatty() else PIPED_WIDTH))
