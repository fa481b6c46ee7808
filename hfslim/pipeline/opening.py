"""Open the model that a user names, with errors that name the wrong argument."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoConfig, PreTrainedModel

from hfslim.pipeline.schema import RecipeError
from hfslim.tasks import Task, find_task, padded_config

__all__ = ["check_source", "explained", "open_classifier", "sources_of", "task_of"]


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Name the argument that cannot be read.

    Raises:
        RecipeError: An `OSError` or `ValueError` was raised inside.
    """
    try:
        yield
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(" ".join(str(error).split())) from error
    except OSError as error:
        raise RecipeError(f"{place} cannot be read: {' '.join(str(error).split())}") from error


def sources_of(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the Hub ids or folders of a key that takes none, one or several.

    Examples:
        >>> sources_of("user/teacher"), sources_of(None)
        (('user/teacher',), ())
    """
    return (value,) if isinstance(value, str) else tuple(value or ())


def check_source(source: str, place: str) -> None:
    """Refuse a path that is no Hub id and no folder, and a folder of a model without its config.

    Raises:
        RecipeError: There is no such folder or config.
    """
    if Path(source).is_dir():
        configs = [Path(source, name) for name in ("config.json", "adapter_config.json")]
        if place != "processor" and not any(path.is_file() for path in configs):
            raise RecipeError(
                f"{place}: the folder {source!r} has no config.json: expected a model as "
                "save_pretrained writes it"
            )
        return
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise RecipeError(f"{place}: no folder {source!r} in {Path.cwd()}, and not a Hub id")


def open_classifier(source: str) -> tuple[Task, PreTrainedModel]:
    """Load a classifier with the labels of its own config.

    Returns:
        The task and the model.

    Raises:
        RecipeError: There is no such model, or it is no classifier.
    """
    check_source(source, "model")
    with explained(f"model {source!r}"):
        task = find_task(AutoConfig.from_pretrained(source))
        config = padded_config(task, source)
        return task, task.auto_model.from_pretrained(source, config=config)


def task_of(source: str) -> str:
    """Return the name of a model's task; raise what `open_classifier` raises."""
    check_source(source, "model")
    with explained(f"model {source!r}"):
        return find_task(AutoConfig.from_pretrained(source)).name
