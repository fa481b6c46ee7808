"""Arguments and options that several verbs share, and how they are read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from hfslim.anatomy.structure import KINDS
from hfslim.pipeline.schema import nearest

if TYPE_CHECKING:
    from hfslim.pipeline.task_examples import TaskExamples

METRICS = (
    *("accuracy", "f1_macro", "f1_binary", "matthews_correlation"),
    *("pearson", "spearman"),
)
CRITERIA = (
    *("obs", "fisher", "kl_fisher", "taylor", "movement", "l0", "activation", "block_influence"),
    *("loss_delta", "spaced", "magnitude", "random"),
)
TARGETS = ("macs", "parameters", "latency", "sparsity")


def one_of(names: Sequence[str]) -> Callable[[Any], Any]:
    """Return a callback that checks the values of an option before anything heavy is imported."""

    def check(given: Any) -> Any:
        for one in [given] if isinstance(given, str) else given or ():
            if one not in names:
                raise typer.BadParameter(f"unknown {one!r}{nearest(one, names)}")
        return given

    return check


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
        help=f"{', '.join(METRICS[:-1])} or {METRICS[-1]}. By default accuracy, or pearson if the "
        "labels are numbers.",
        callback=one_of(METRICS),
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
        callback=one_of(KINDS),
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
    alone = len(given) == 1 and "=" not in given[0]
    by_kind = {} if alone else {k: str(name) for k, name in pairs(given, "--criterion").items()}
    names = given if alone else list(by_kind.values())
    for values, valid in ((list(by_kind), KINDS), (names, CRITERIA)):
        try:
            one_of(valid)(values)
        except typer.BadParameter as error:
            raise typer.BadParameter(error.message, param_hint="'--criterion'") from None
    return given[0] if alone else by_kind


def target(given: Sequence[str]) -> dict[str, Any]:
    """Read `--target`, and check its names and numbers before anything heavy is imported.

    Raises:
        BadParameter: It names no target, several, or a number out of range.
    """
    values = pairs(given, "--target")

    def refuse(message: str) -> NoReturn:
        raise typer.BadParameter(message, param_hint="'--target'")

    for name in values:
        if name not in TARGETS:
            refuse(f"unknown {name!r}{nearest(name, TARGETS)}")
    if len(values) > 1:
        refuse(f"got {' and '.join(values)}, expected one of {', '.join(TARGETS)}")
    (name, value), *_ = values.items()
    by_kind = value if name == "sparsity" and isinstance(value, Mapping) else {name: value}
    for key, number in by_kind.items():
        if by_kind is value and key not in KINDS:
            refuse(f"unknown {name}.{key}{nearest(key, KINDS)}")
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not (0 <= number < 1 if name == "sparsity" else 0 < number <= 1):
            what = "to remove, in [0, 1)" if name == "sparsity" else "to keep, in (0, 1]"
            refuse(f"got {name}={number!r}, expected the fraction {what}")
    return values


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
    from hfslim.pipeline.schema import build
    from hfslim.pipeline.task_examples import TaskExamples, uses_cpu
    from hfslim.tasks import TASKS, DataConfig

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
