"""Examples that a cache recognises: keys by content, and reproducible augmentation."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset

from hfslim.distillation.cache.teacher_cache import CacheError
from hfslim.tasks.pairing import PREFIX, own_inputs

__all__ = ["KEYS", "KeyedCollator", "SeededExamples", "drawing_from", "random_state"]

KEYS = "teacher_cache_keys"
"""Name under which a batch carries its examples' keys, `[batch, 2]` int64."""
_LABELS = ("label", "label_ids", "labels")


class KeyedCollator:
    """Adds to each batch a key for every example: the hash of the inputs that the models read.

    The key is computed before padding, so that it is independent of the batch, the order and the
    number of processes; an example that augmentation changes gets another key.

    Args:
        collator: Makes a batch of examples.
        teacher_alone: Whether all teachers have inputs of their own. Then only those are hashed,
            and the student's may change from epoch to epoch.
    """

    def __init__(self, collator: Any, teacher_alone: bool = False) -> None:
        self.collator = collator
        self.teacher_alone = teacher_alone

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        """Collate examples."""
        read = [own_inputs(one, PREFIX) for one in features] if self.teacher_alone else features
        keys = torch.from_numpy(np.stack([example_key(one) for one in read]))
        before = random_state()
        batch = self.collator(features)
        if not self.teacher_alone and random_state() != before:
            raise CacheError(
                f"the collator {type(self.collator).__name__} draws random numbers, as mixup does, "
                "so that the keys of the examples do not identify the batch: let the data set "
                "change examples when they are read, or leave teacher_cache out."
            )
        batch[KEYS] = keys
        return batch


def example_key(example: Mapping[str, Any]) -> np.ndarray:
    """Hash an example's inputs, labels aside, to two int64.

    Examples:
        >>> one = example_key({"input_ids": [1, 2], "label": 0})
        >>> bool((one == example_key({"label": 1, "input_ids": np.array([1, 2])})).all())
        True
        >>> bool((one == example_key({"input_ids": [1, 3], "label": 0})).all())
        False
    """
    state = xxhash.xxh3_128()
    for name in sorted(set(example) - set(_LABELS)):
        try:
            array = np.asarray(example[name])
        except ValueError:  # Lists of unequal length.
            array = np.asarray(None)
        if array.dtype.kind in "iub":
            array = array.astype(np.int64)
        elif array.dtype.kind == "f":
            array = array.astype(np.float32)
        elif array.dtype.kind == "O":
            raise CacheError(
                f"teacher_cache hashes the inputs of examples, and {name!r} holds "
                f"{type(example[name]).__name__} that cannot be hashed; drop that column, or leave "
                "teacher_cache out."
            )
        state.update(f"{name}{array.shape}{array.dtype}".encode())
        state.update(np.ascontiguousarray(array).tobytes())
    return np.frombuffer(state.digest(), dtype=np.int64)


class SeededExamples(Dataset[Any]):
    """Reads each example with random numbers that its index and the epoch seed.

    Its augmentation is then independent of process, order, worker and resume. The generators of
    torch on the CPU, numpy and Python are seeded.

    Args:
        examples: A data set of known length that augments examples when they are read.
        seed: Seed of the whole data set.
        epochs: Number of epochs after which the augmentation repeats.

    Attributes:
        epoch: The current epoch, from 0. The reader sets it: accelerate calls a `set_epoch` in a
            single process only.
    """

    def __init__(self, examples: Any, seed: int, epochs: int) -> None:
        self.examples = examples
        self.seed, self.epochs = seed, epochs
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        """Read an example with its random numbers of this epoch."""
        with drawing_from(self.seed, self.epoch % self.epochs, int(index)):
            return self.examples[int(index)]


@contextmanager
def drawing_from(*key: int) -> Iterator[None]:
    """Seed random numbers by some integers inside the block, and restore their state after it."""
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
    """Return a state that differs after random numbers were drawn."""
    numpy: Any = np.random.get_state()
    torchs = torch.get_rng_state().numpy().tobytes()
    return random.getstate(), numpy[1].tobytes(), numpy[2:], torchs
