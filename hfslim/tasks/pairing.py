"""A teacher's own inputs beside its student's, in every example and batch.

A teacher of another family has another tokenizer, image size or sampling rate. Each raw example is
then processed twice, and the teacher's inputs are named with the prefix `teacher_`; with several
teachers `teacher_0_`, `teacher_1_` and so on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    SequenceFeatureExtractor,
    default_data_collator,
)

__all__ = [
    "PREFIX",
    "PairedCollator",
    "collator_of",
    "has_words",
    "own_inputs",
    "prefixes",
    "same_processing",
    "settings_of",
    "student_inputs",
    "teacher_inputs",
]

PREFIX = "teacher_"
_LABELS = ("label", "label_ids", "labels")
_NAMES = ("processor_class", "image_processor_type", "feature_extractor_type", "auto_map")

Collator = Callable[[list[dict[str, Any]]], Any]


def teacher_inputs(inputs: Mapping[str, Any], prefix: str = PREFIX) -> dict[str, Any]:
    """Add a teacher's prefix to the names of its processor's results, of one example or a batch.

    Examples:
        >>> teacher_inputs({"input_ids": [1, 2]})
        {'teacher_input_ids': [1, 2]}
    """
    return {f"{prefix}{name}": value for name, value in inputs.items()}


def own_inputs(inputs: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the inputs of the teacher with this prefix, by the names of its model."""
    return {k.removeprefix(prefix): v for k, v in inputs.items() if k.startswith(prefix)}


def student_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs that are no teacher's own."""
    return {name: value for name, value in inputs.items() if not name.startswith(PREFIX)}


def prefixes(processors: Sequence[Any]) -> list[str]:
    """Return each teacher's prefix, by its processor; None reads the student's and has none."""
    several = len(processors) > 1
    return [
        "" if processor is None else f"{PREFIX}{index}_" if several else PREFIX
        for index, processor in enumerate(processors)
    ]


class PairedCollator:
    """Makes a batch of the student's inputs and of each teacher's own inputs.

    Args:
        student: Collator of the student's inputs and labels.
        teachers: Collator of each teacher's inputs, by its prefix.

    Raises:
        ValueError: The examples lack a teacher's inputs, or a teacher's collator returns another
            number of rows than there are examples.
    """

    def __init__(self, student: Collator, teachers: Mapping[str, Collator]) -> None:
        self.student = student
        self.teachers = dict(teachers)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate examples."""
        batch = dict(self.student([student_inputs(row) for row in rows]))
        for prefix, collate in self.teachers.items():
            own = [own_inputs(row, prefix) for row in rows]
            if not all(own):
                raise ValueError(
                    f"an example holds {', '.join(sorted(rows[0]))} and nothing that begins with "
                    f"{prefix!r}, for a teacher with a processor of its own: process each example "
                    "for the teacher too, and name the result by "
                    "hfslim.distillation.teacher_inputs; let a data set that is processed when it "
                    "is read keep all of its columns by "
                    "remove_unused_columns=False."
                )
            theirs = {k: v for k, v in dict(collate(own)).items() if k not in _LABELS}
            for name, value in theirs.items():
                if len(value) != len(rows):
                    raise ValueError(
                        f"{prefix}{name} has {len(value)} rows for {len(rows)} examples: the "
                        "teacher's collator must give one for each."
                    )
            batch |= teacher_inputs(theirs, prefix)
        return batch


def collator_of(processor: Any) -> Collator:
    """Return the collator of a processor's results: padding for text and audio, else stacking."""
    if isinstance(processor, PreTrainedTokenizerBase | SequenceFeatureExtractor):
        return DataCollatorWithPadding(processor)  # type: ignore[arg-type]
    return default_data_collator


def same_processing(one: Any, other: Any) -> bool:
    """Return whether two processors make the same inputs of the same example."""
    if isinstance(one, PreTrainedTokenizerBase) and isinstance(other, PreTrainedTokenizerBase):
        return one.get_vocab() == other.get_vocab() and _rules(one) == _rules(other)
    return type(one) is type(other) and settings_of(one) == settings_of(other)


def settings_of(processor: Any) -> str:
    """Return the settings of an image processor or feature extractor as text.

    The text is empty for a tokenizer or None, whose results are in the examples themselves.
    """
    if not hasattr(processor, "to_dict"):
        return ""
    values = {k: v for k, v in processor.to_dict().items() if k not in _NAMES}
    return json.dumps(values, sort_keys=True, default=str)


def has_words(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a vocabulary; without files transformers loads none."""
    return bool(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))


def _rules(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    return {k: v for k, v in rules.items() if k not in ("truncation", "padding")}
