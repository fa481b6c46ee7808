"""Calibration data that can be gone through more than once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

Batch = dict[str, Any]


class Batches:
    """The first examples of some batches of model inputs, as often as they are asked for.

    A list or a DataLoader is gone through anew each time; what can be gone through only once, such
    as a generator, is kept in memory from the first time on.

    Args:
        data: Batches of model inputs, with or without `labels`.
        max_examples: Examples to use at most.

    Raises:
        ValueError: `max_examples` is less than 1; or, on the way, a batch is no dict of tensors.
    """

    def __init__(self, data: Iterable[Mapping[str, Any]], max_examples: int) -> None:
        if max_examples < 1:
            raise ValueError(f"max_examples must be at least 1, got {max_examples}")
        self.max_examples = max_examples
        self._data = data
        self._once = isinstance(data, Iterator)

    def __iter__(self) -> Iterator[Batch]:
        if self._once:
            self._data, self._once = list(_limited(self._data, self.max_examples)), False
        return _limited(self._data, self.max_examples)


def _limited(data: Iterable[Mapping[str, Any]], max_examples: int) -> Iterator[Batch]:
    left = max_examples
    for batch in data:
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"data gives {type(batch).__name__} where a batch is expected, a dict of tensors: "
                "pass a list of batches, or a DataLoader"
            )
        tensors = {k: v[:left] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
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
