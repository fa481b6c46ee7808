"""Open the model that a user names, with errors that say which name was wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import AutoConfig, PreTrainedModel

from hfslim.pipeline.recipe import check_source
from hfslim.pipeline.schema import RecipeError
from hfslim.tasks import Task, find_task

__all__ = ["explained", "open_classifier", "task_of"]


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Say which part of what was asked cannot be read.

    Raises:
        RecipeError: An `OSError` was raised inside.
    """
    try:
        yield
    except OSError as error:
        raise RecipeError(f"{place} cannot be read: {' '.join(str(error).split())}") from error


def open_classifier(source: str) -> tuple[Task, PreTrainedModel]:
    """Load a classifier by its own config, with the labels that it has.

    Args:
        source: Hub id or local folder.

    Returns:
        Its task, and the model.

    Raises:
        RecipeError: There is no such model.
        ValueError: It is no classifier.
    """
    check_source(source, "model")
    with explained(f"model {source!r}"):
        config = AutoConfig.from_pretrained(source)
        task = find_task(config)
        return task, task.auto_model.from_pretrained(source, config=config)


def task_of(source: str) -> str:
    """Return the name of a model's task, by its config.

    Raises:
        RecipeError: There is no such model.
        ValueError: It is no classifier.
    """
    check_source(source, "model")
    with explained(f"model {source!r}"):
        return find_task(AutoConfig.from_pretrained(source)).name
