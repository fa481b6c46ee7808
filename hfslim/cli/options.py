"""Arguments and options that several verbs share, and how they are read."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfslim.anatomy.structure import KINDS

if TYPE_CHECKING:
    from hfslim.pipeline.task_examples import TaskExamples

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_data = typer.Option(
    "--data",
    metavar="NAME|FILE|KEY=VALUE",
    help="Labelled examples: a Hub id or `digits`, a csv, json or parquet file, a recipe whose "
    "data to use, or a key of a recipe's `data` with its value, such as "
    "`text_column_name=sentence`. Can be given several times.",
)
Data = Annotated[list[str] | None, _data]
GivenData = Annotated[list[str], _data]
Metric = Annotated[
    str | None,
    typer.Option(
        help="accuracy, f1_macro, f1_binary, matthews_correlation, pearson or spearman. By default "
        "accuracy, or pearson if the labels are numbers."
    ),
]
BatchSizes = Annotated[
    list[int] | None,
    typer.Option(
        "--batch-size",
        min=1,
        help="Examples per call; can be given several times; 1 and 32 by default.",
    ),
]
Length = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens, samples or frames per example, if the model does not fix it."
    ),
]
Calls = Annotated[int, typer.Option(min=1, help="Timed calls of each model.")]
UnitKinds = Annotated[
    list[str] | None,
    typer.Option(
        "--units",
        metavar="KIND",
        help=f"A kind of unit: {', '.join(KINDS)}; can be given several times.",
        autocompletion=lambda: list(KINDS),
    ),
]
CriterionNames = Annotated[
    list[str] | None,
    typer.Option(
        "--criterion",
        metavar="NAME|KIND=NAME",
        help="How units are scored, for all kinds or for one: `fisher`, `kl_fisher`, `taylor`, "
        "`activation`, `magnitude`, `layers=block_influence` and others; a wrong name lists all.",
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", file_okay=False, help="A new or empty folder.")
]
Seed = Annotated[int, typer.Option(help="Seed of every draw.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or folder of a classifier.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples per call of the model.")]
MaxExamples = Annotated[
    int, typer.Option(min=1, help="Training examples to score the units on, at most.")
]


def pairs(given: Sequence[str], option: str) -> dict[str, Any]:
    """Read `key=value` and `key.key=value` into nested values, as YAML reads them.

    Raises:
        BadParameter: An argument has another form.
    """
    from hfslim.pipeline.schema import read_yaml

    values: dict[str, Any] = {}
    for one in given:
        path, equals, text = one.partition("=")
        if not equals or not all(part.isidentifier() for part in path.split(".")):
            raise typer.BadParameter(f"expected KEY=VALUE, got {one!r}", param_hint=option)
        node = values
        *above, last = path.split(".")
        for part in above:
            node = node.setdefault(part, {})
        node[last] = read_yaml(text, f"{option} {one[:80]}")
    return values


def criteria(given: Sequence[str]) -> str | dict[str, str]:
    """Read `--criterion`: one name for all kinds, or a name for each."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    return {kind: str(name) for kind, name in pairs(given, "--criterion").items()}


def check_empty(output: Path) -> None:
    """Raise `OutputError` if a folder holds something."""
    from hfslim.pipeline.manifest import OutputError

    if output.exists() and any(output.iterdir()):
        raise OutputError(f"{str(output)!r} is there and not empty: choose another --output")


def data_section(given: Sequence[str]) -> dict[str, Any]:
    """Read `--data` into the `data` section of a recipe, without a check of its keys.

    A folder with a README.md is a data set in the format of the Hub.

    Raises:
        RecipeError: A recipe does not exist, or the kind of a folder is unclear.
    """
    from hfslim.pipeline.schema import RecipeError, mapping_at, read_yaml

    values: dict[str, Any] = {}
    for one in given:
        path = Path(one)
        if "=" in one and one.partition("=")[0].isidentifier():
            values |= pairs([one], "--data")
        elif path.suffix in (".yaml", ".yml"):
            if not path.is_file():
                raise RecipeError(f"--data: no recipe {one!r} in {Path.cwd()}")
            recipe = mapping_at(read_yaml(path, one), one)
            values |= mapping_at(recipe.get("data"), f"{one} data")
        elif path.is_dir() and not (path / "README.md").exists():
            raise RecipeError(
                f"--data: {one!r} is a folder: give train_dir={one} if it has a subfolder for "
                f"each class, dataset_name={one} if it is a data set"
            )
        else:
            values["train_file" if path.suffix and not path.is_dir() else "dataset_name"] = one
    return values


def open_examples(
    model: str, data: Sequence[str], metric: str | None, seed: int, batch_size: int
) -> TaskExamples:
    """Prepare the examples of `--data` for a model.

    Raises:
        RecipeError: The data or the model cannot be read.
        ValueError: The data do not fit the model or the metric.
    """
    from transformers import TrainingArguments

    from hfslim.pipeline.opening import task_of
    from hfslim.pipeline.schema import RecipeError, build, nearest
    from hfslim.pipeline.task_examples import TaskExamples, uses_cpu
    from hfslim.tasks import METRICS, TASKS, DataConfig

    if metric is not None and metric not in METRICS:
        raise RecipeError(f"metric: unknown {metric!r}{nearest(metric, METRICS)}")
    config = build(DataConfig, data_section(data), "data")
    task = task_of(model)
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        use_cpu=uses_cpu(),
        report_to="none",
        remove_unused_columns=not TASKS[task].lazy,
    )
    return TaskExamples.prepare(task, config, metric, seed, arguments, model)
