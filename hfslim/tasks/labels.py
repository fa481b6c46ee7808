"""The label space of a data set, and the targets that a model learns from labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets

from hfslim.tasks.metrics import Problem


@dataclass(frozen=True)
class Labels:
    """The label space of a data set.

    Attributes:
        problem: transformers' `problem_type`.
        names: Class names in the order of the model's outputs; one name for regression.
        class_names: Names of a `ClassLabel` column, whose values are indices into them; empty where
            the values are the names.
        vectors: Whether a multi-label value is a 0/1 vector, not a list of classes.
    """

    problem: Problem
    names: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    vectors: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """Fields of a model's config that the labels determine."""
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
            "problem_type": self.problem,
        }

    def ordered_like(self, names: Sequence[str]) -> Labels | None:
        """Return these labels in the order of `names`, or None where they differ.

        Upper and lower case are the same.
        """
        mine = {name.casefold(): name for name in self.names}
        theirs = [name.casefold() for name in names]
        if self.vectors or sorted(mine) != sorted(theirs):
            return None
        return replace(self, names=tuple(mine[name] for name in theirs))

    def encode(self, values: Iterable[Any]) -> list[Any]:
        """Turn a column of the data into targets: indices, 0/1 vectors or floats.

        Raises:
            ValueError: A value is missing or is not among the labels.
        """
        if self.problem == "regression":
            return [self._number(value) for value in values]
        index = {name: i for i, name in enumerate(self.names)}
        if self.problem == "single_label_classification":
            return [self._look_up(value, index) for value in values]
        if self.vectors:
            return [self._vector(value) for value in values]
        active = ({self._look_up(one, index) for one in value} for value in values)
        return [[float(i in found) for i in range(len(self.names))] for found in active]

    def _number(self, value: Any) -> float:
        if value is None or math.isnan(value):
            raise ValueError("a label is missing (None or NaN): remove the row or fill it in")
        return float(value)

    def _vector(self, value: Sequence[Any]) -> list[float]:
        if len(value) != len(self.names) or not set(value) <= {0, 1}:
            raise ValueError(
                f"label {list(value)!r}: expected {len(self.names)} values of 0 or 1, "
                "as in the training data"
            )
        return [float(v) for v in value]

    def _look_up(self, value: Any, index: dict[str, int]) -> int:
        if self.class_names and isinstance(value, int):
            if not 0 <= value < len(self.class_names):
                raise ValueError(
                    f"label {value} means 'no label known' (the classes are 0 to "
                    f"{len(self.class_names) - 1}): choose a split that has labels"
                )
            value = self.class_names[value]
        if value is None:
            raise ValueError("a label is missing (None): remove the row or fill it in")
        try:
            return index[str(value)]
        except KeyError:
            raise ValueError(
                f"label {value!r} is not among the labels of the training data: {list(self.names)}"
            ) from None


def find_labels(dataset: datasets.Dataset, column: str) -> Labels:
    """Determine the label space from a column of the training data.

    `ClassLabel`, strings, integers and booleans make a single-label problem, lists a multi-label
    problem (of class names, `ClassLabel` or 0/1 vectors), floats a regression.

    Raises:
        ValueError: The column holds something else, missing values, or only one class.
    """
    feature = dataset.features[column]
    inner = getattr(feature, "feature", None)
    single: Problem = "single_label_classification"
    multi: Problem = "multi_label_classification"
    for problem, holder in ((single, feature), (multi, inner)):
        if isinstance(holder, datasets.ClassLabel):
            names = tuple(holder.names)
            return _with_several(problem, names, column, class_names=names)
    values = list(dataset[column])
    missing = sum(value is None or value != value for value in values)
    if missing:
        raise ValueError(
            f"{missing} of {len(values)} rows have no label in column {column!r}: "
            "remove them or fill them in"
        )
    first = values[0]
    if isinstance(first, str | int):
        distinct = sorted(set(values))
        return _with_several(single, tuple(map(str, distinct)), column)
    if isinstance(first, float):
        return Labels("regression", (column,))
    if isinstance(first, list):
        members = {member for value in values for member in value}
        if all(isinstance(member, str) for member in members):
            return _with_several(multi, tuple(sorted(members)), column)
        if members <= {0, 1} and len({len(value) for value in values}) == 1:
            names = tuple(str(i) for i in range(len(first)))
            return _with_several(multi, names, column, vectors=True)
    raise ValueError(
        f"column {column!r} holds {first!r}: expected class names, integers, floats, "
        "lists of class names, or 0/1 vectors of one length"
    )


def _with_several(problem: Problem, names: tuple[str, ...], column: str, **rest: Any) -> Labels:
    if len(names) < 2:
        raise ValueError(
            f"column {column!r} has one label only ({', '.join(names) or 'none'}): "
            "a classifier needs two or more"
        )
    return Labels(problem, names, **rest)
