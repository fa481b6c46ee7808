"""Augmentation that comes out the same whenever, wherever and by whomever an example is read."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

__all__ = ["SeededExamples", "drawing_from", "random_state"]


class SeededExamples(Dataset[Any]):
    """Reads each example with random numbers of its own, which its index and the epoch tell.

    So what an augmentation makes of it depends on no process, order, worker or resume. Random
    numbers are those of torch on the CPU, numpy and Python, as augmentations draw them.

    Args:
        examples: Of a known length, augmented when they are read.
        seed: Of all.
        epochs: Number of epochs after which the augmentation of the first one comes again.

    Attributes:
        epoch: That is being read, counted from 0. accelerate would call a `set_epoch` in a single
            process alone, so that whoever reads sets it.
    """

    def __init__(self, examples: Any, seed: int, epochs: int) -> None:
        self.examples = examples
        self.seed, self.epochs = seed, epochs
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        """Read an example as it is in this epoch."""
        with drawing_from(self.seed, self.epoch % self.epochs, int(index)):
            return self.examples[int(index)]


@contextmanager
def drawing_from(*key: int) -> Iterator[None]:
    """Seed random numbers by some integers inside the block, and put them back behind it."""
    numbers = np.random.SeedSequence(key).generate_state(3)
    python, numpy, ours = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(numbers[0]))
    np.random.seed(numbers[1])
    torch.default_generator.manual_seed(int(numbers[2]))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(ours)


def random_state() -> tuple[Any, ...]:
    """Return what tells whether random numbers were drawn in between, by comparing."""
    numpy: Any = np.random.get_state()
    torchs = torch.get_rng_state().numpy().tobytes()
    return random.getstate(), numpy[1].tobytes(), numpy[2:], torchs
