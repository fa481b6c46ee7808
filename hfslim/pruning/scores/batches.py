"""Calibration data that can be read more than once, and batches that fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import PreTrainedConfig

from hfslim.anatomy.outputs import label_names
from hfslim.training.objective import IGNORED_LABEL, ProblemType, problem_type

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
T = TypeVar("T")


class Batches:
    """The first examples of batches of model inputs, of some classes or all, for repeated reading.

    A list or a DataLoader is read again each time; an iterator, such as a generator, is read once
    and kept in memory.

    Raises:
        ValueError: `max_examples` is less than 1; or, while reading, a batch is not a dict of
            tensors, or has no labels although `classes` are given.
    """

    def __init__(
        self,
        data: Iterable[Mapping[str, Any]],
        max_examples: int,
        classes: Sequence[int] | None = None,
    ) -> None:
        if max_examples < 1:
            raise ValueError(f"max_examples must be at least 1, got {max_examples}")
        self.max_examples = max_examples
        self._data = data if classes is None else _OfClasses(data, tuple(classes))
        self._once = isinstance(data, Iterator)

    def __iter__(self) -> Iterator[Batch]:
        if self._once:
            self._data, self._once = list(_limited(self._data, self.max_examples)), False
        return _limited(self._data, self.max_examples)


def class_numbers(config: PreTrainedConfig, classes: Sequence[int | str]) -> tuple[int, ...]:
    """Return the numbers of classes, given by number or name; raise a ValueError on others."""
    if problem_type(config) == "regression":
        raise ValueError("classes: the model predicts values, not classes")
    known = label_names(config)
    named = dict(zip(known, range(len(known)), strict=True))
    numbers = [named.get(c, -1) if isinstance(c, str) else c for c in classes]
    if not numbers or not {*numbers} <= {*range(len(known))}:
        raise ValueError(
            f"classes {list(classes)!r}: expected some of {list(known)}, or their numbers"
        )
    return tuple(dict.fromkeys(numbers))


def check_classes(labels: torch.Tensor, classes: int, problem: ProblemType) -> None:
    """Raise a ValueError on classes that the model does not have; a GPU would abort the process."""
    if problem == "single_label_classification" and len(labels):
        lowest, highest = labels.min().item(), labels.max().item()
        if highest >= classes or (lowest < 0 and lowest != IGNORED_LABEL):
            raise ValueError(
                f"labels go from {lowest} to {highest}, the model has classes 0 to {classes - 1}"
            )


def class_of_each(labels: torch.Tensor | None, classes: int) -> torch.Tensor:
    """Return the class of each example, `[examples]`; raise a ValueError where there is not one."""
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        given = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(
            "importance by class needs the class of each example, integers `labels` [examples]; "
            f"the batch has {given}"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"importance by class needs a class from 0 to {classes - 1} for each example; labels "
            f"go from {labels.min().item()} to {labels.max().item()}"
        )
    return labels


class _OfClasses:
    """The examples that have one of some classes, among their labels or as their only label."""

    def __init__(self, data: Iterable[Mapping[str, Any]], classes: tuple[int, ...]) -> None:
        self.data, self.classes = data, classes

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.data:
            labels = batch.get("labels", batch.get("label"))
            if labels is None:
                raise ValueError(
                    "classes chooses examples by their labels, and the calibration data has none: "
                    "add `labels` to the batches"
                )
            wanted = torch.tensor(self.classes, device=labels.device)
            rows = labels[:, wanted].any(1) if labels.ndim > 1 else torch.isin(labels, wanted)
            if rows.any():
                yield _rows(batch, rows)


def _limited(data: Iterable[Mapping[str, Any]], max_examples: int) -> Iterator[Batch]:
    left = max_examples
    for batch in data:
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"data gives {type(batch).__name__} where a batch is expected, a dict of tensors: "
                "pass a list of batches, or a DataLoader"
            )
        tensors = _rows(batch, slice(left))
        sizes = [len(v) for v in tensors.values() if isinstance(v, torch.Tensor)]
        if not sizes:
            raise ValueError(
                f"a batch holds no tensors, only {sorted(tensors)}: data must give batches of "
                "model inputs, such as a DataLoader or a list of dicts of tensors"
            )
        left -= sizes[0]
        yield tensors
        if left <= 0:
            return


def run_within_memory(
    run: Callable[[Iterable[Mapping[str, Any]]], T], data: Iterable[Mapping[str, Any]]
) -> T:
    """Run a function over batches; halve the batches and restart while they do not fit into memory.

    Args:
        run: Must start from scratch at each call, and not depend on how examples are batched.
        data: Batches that can be read more than once.

    Raises:
        RuntimeError: Single examples do not fit either; on a GPU `torch.OutOfMemoryError`.
    """
    most: int | None = None
    while True:
        sizes = [1]
        try:
            return run(_split(data, most, sizes))
        except RuntimeError as error:
            if max(sizes) == 1 or not should_reduce_batch_size(error):
                raise
            most, reason = (max(sizes) + 1) // 2, str(error).partition("\n")[0]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning(
            "out of memory on %d examples at once (%s): starting anew with %d; smaller batches of "
            "calibration data would save the first try",
            *(max(sizes), reason, most),
        )


def _split(
    data: Iterable[Mapping[str, Any]], most: int | None, sizes: list[int]
) -> Iterator[Mapping[str, Any]]:
    """Yield batches of up to `most` examples, and append the size of each to `sizes`."""
    for batch in data:
        size = next((len(v) for v in batch.values() if isinstance(v, torch.Tensor)), 1)
        step = max(size if most is None else min(size, most), 1)
        for start in range(0, max(size, 1), step):
            part = slice(start, start + step)
            sizes.append(min(step, size - start))
            yield batch if step >= size else _rows(batch, part)


def _rows(batch: Mapping[str, Any], rows: slice | torch.Tensor) -> Batch:
    """Return some examples of a batch."""
    return {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
