"""The tasks by name, and the task of a model."""

from __future__ import annotations

from transformers import PreTrainedConfig

from hfslim.anatomy.model_state import check_head
from hfslim.tasks.audio import AudioClassification
from hfslim.tasks.base import Task
from hfslim.tasks.image import ImageClassification
from hfslim.tasks.text import TextClassification

TASKS: dict[str, Task] = {
    task.name: task for task in (TextClassification(), ImageClassification(), AudioClassification())
}


def find_task(config: PreTrainedConfig) -> Task:
    """Return a model's task, by the class names in its config.

    Raises:
        ValueError: The config names a model that is no classifier, or its family has none for any
            task, or several and the config does not name one.
    """
    check_head(*(config.architectures or ()))
    names = {
        task: set(task.classifiers.get(config.model_type, ()))
        for task in TASKS.values()
        if config.model_type in task.classifiers
    }
    exact = [task for task, own in names.items() if own & set(config.architectures or ())]
    if len(exact or names) == 1:
        return next(iter(exact or names))
    if names:
        raise ValueError(
            f"{config.model_type} classifies for {[task.name for task in names]} and the config's "
            f"architectures {config.architectures} do not name one"
        )
    raise ValueError(
        f"{config.model_type!r} is no classifier for any of {list(TASKS)}: expected a model that "
        "AutoModelForSequenceClassification or its kin for images and audio load"
    )
