"""Which auto class loads the models of a student's task."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)
from transformers.models.auto import modeling_auto

from hfslim.anatomy.adapters import base_of

__all__ = ["auto_class"]

_TASKS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (
        AutoModelForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    (
        AutoModelForImageClassification,
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ),
    (
        AutoModelForAudioClassification,
        modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    ),
)


def auto_class(student: nn.Module) -> Any:
    """Return the auto class of a classifier's task.

    Raises:
        ValueError: If it is no sequence, image or audio classifier of transformers.
    """
    base = base_of(student)
    classes = {cls.__name__ for cls in type(base).__mro__}
    for auto, names in _TASKS:
        for entry in names.values():
            if classes & set((entry,) if isinstance(entry, str) else entry):
                return auto
    raise ValueError(
        f"{type(base).__name__} is no sequence, image or audio classifier of transformers, so the "
        "class of its teacher is unknown; load the teacher yourself and pass the model."
    )
