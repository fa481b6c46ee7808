"""The label space of a data set, and the targets that a model learns from labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import datasets

from hfslim.anatomy.outputs import ProblemType, numbers_of, pair_names


@dataclass(frozen=True)
class Labels:
    """The label space of a data set, in the data's order or in that of a model's outputs.

    Attributes:
        problem: transformers' `problem_type`.
        names: Class names in the order of the model's outputs; one name for regression.
        class_names: Names of a `ClassLabel` column, whose values are indices into them; empty where
            the values are the names.
        vectors: Whether a multi-label value is a 0/1 vector, not a list of classes.
        values: The data's label of each output, where the model gives it another name.
        positive: The output of the class that `f1_binary` is about.
        by: What pairs the labels with the outputs: `given` by the user, or as in
            `hfslim.anatomy.outputs.Pairing`; None before they are paired.
    """

    problem: ProblemType
    names: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    vectors: bool = False
    values: tuple[str, ...] = ()
    positive: int = 1
    by: Literal["given", "name", "id", "position"] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Fields of a model's config that the labels determine."""
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
            "problem_type": self.problem,
        }

    @property
    def in_data(self) -> tuple[str, ...]:
        """The data's label of each output."""
        return self.values or self.names

    def paired(self, outputs: Sequence[str], order: Sequence[str | int] | None = None) -> Labels:
        """Return the labels of the data in the order of a model's outputs.

        Outputs without a label in the data keep their names. A model with one output makes
        whole numbers a regression.

        Args:
            outputs: Names of the model's outputs.
            order: The data's label of each output, as the user gives them.

        Raises:
            ValueError: The labels do not fit the outputs.
        """
        mine, numbers = self.names, numbers_of(self.names)
        if len(outputs) == 1 and numbers is not None and not self.class_names:
            return replace(self, problem="regression", names=tuple(outputs), by="name")
        if self.problem == "regression":
            if len(outputs) > 1:
                raise ValueError(f"the data hold numbers, the model has the labels {list(outputs)}")
            return replace(self, by="name")
        theirs = tuple(str(one) for one in order or outputs)
        if len(theirs) != len(outputs) or (self.vectors and len(mine) != len(theirs)):
            raise ValueError(f"{list(theirs)} are not the {len(outputs)} outputs {list(outputs)}")
        pairing = pair_names(mine, theirs)
        by: Any = "id" if self.class_names and pairing.by == "position" else pairing.by
        if order and by != "name":
            raise ValueError(f"label_names {list(theirs)}: expected the data's labels {list(mine)}")
        own = dict(zip(pairing.order, mine, strict=True))
        values = tuple(own.get(i, name) for i, name in enumerate(theirs))
        named = numbers is not None and numbers_of(outputs) is None
        return replace(
            self,
            names=tuple(outputs) if named else values,
            values=values if named or self.vectors else (),
            positive=pairing.order[self.positive],
            by="given" if order else by,
        )

    def with_positive(self, label: str | int | None) -> Labels:
        """Return the labels with another positive class; raise ValueError for an unknown one."""
        if label is None:
            return self
        if str(label) not in self.in_data:
            raise ValueError(f"positive_label {label!r} is not among {list(self.in_data)}")
        return replace(self, positive=self.in_data.index(str(label)))

    def encode(self, values: Iterable[Any]) -> list[Any]:
        """Turn a column of the data into targets: indices, 0/1 vectors or floats.

        Raises:
            ValueError: A value is missing or is not among the labels.
        """
        if self.problem == "regression":
            return [self._number(value) for value in values]
        index = {name: i for i, name in enumerate(self.in_data)}
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
        return [float(value[int(column)]) for column in self.in_data]

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
                f"label {value!r} is not among the labels of the training data: "
                f"{list(self.in_data)}"
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
    single: ProblemType = "single_label_classification"
    multi: ProblemType = "multi_label_classification"
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


def _with_several(problem: ProblemType, names: tuple[str, ...], column: str, **rest: Any) -> Labels:
    if len(names) < 2:
        raise ValueError(
            f"column {column!r} has one label only ({', '.join(names) or 'none'}): "
            "a classifier needs two or more"
        )
    return Labels(problem, names, **rest)
