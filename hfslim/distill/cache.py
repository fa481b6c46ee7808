"""A teacher's logits on disk, found by what an example holds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from transformers.utils import logging

from hfslim.pairing import PREFIX, own_inputs

__all__ = ["KEYS", "CacheError", "KeyedCollator", "TeacherCache", "fingerprint"]

logger = logging.get_logger(__name__)

KEYS = "teacher_cache_keys"
"""Name under which a batch carries its examples' keys, `[batch, 2]` int64."""
_LABELS = ("label", "label_ids", "labels")
_VERSION = 1


class CacheError(ValueError):
    """A teacher cache is damaged, or holds another teacher's outputs."""


class KeyedCollator:
    """Adds to each batch a key for every example: the hash of what the models read of it.

    The key is taken before padding, so that it depends neither on the batch, nor on the order, nor
    on the number of processes; an example that augmentation changes gets another key.

    Args:
        collator: What makes the batch.
        teacher_alone: Whether all teachers have inputs of their own, so that only those are hashed,
            and the student's may change from epoch to epoch.
    """

    def __init__(self, collator: Any, teacher_alone: bool = False) -> None:
        self.collator = collator
        self.teacher_alone = teacher_alone

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        """Collate examples."""
        read = [own_inputs(one, PREFIX) for one in features] if self.teacher_alone else features
        keys = torch.from_numpy(np.stack([example_key(one) for one in read]))
        batch = self.collator(features)
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
        array = np.asarray(example[name])
        if array.dtype.kind in "iub":
            array = array.astype(np.int64)
        elif array.dtype.kind == "f":
            array = array.astype(np.float32)
        elif array.dtype.kind == "O":
            raise CacheError(
                f"teacher_cache finds examples by what they hold, and {name!r} holds "
                f"{type(example[name]).__name__} of which no bytes can be taken; drop that column, "
                "or leave teacher_cache out."
            )
        state.update(f"{name}{array.shape}{array.dtype}".encode())
        state.update(np.ascontiguousarray(array).tobytes())
    return np.frombuffer(state.digest(), dtype=np.int64)


def fingerprint(teacher: nn.Module, order: Tensor | None) -> str:
    """Hash a teacher's weights and the order of its labels.

    Args:
        teacher: The teacher.
        order: Of `align_labels`.
    """
    state = xxhash.xxh3_128()
    for name, value in sorted(teacher.state_dict().items()):
        state.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    state.update(str(None if order is None else order.tolist()).encode())
    return state.hexdigest()


class TeacherCache:
    """The logits of one teacher, memory-mapped.

    Args:
        folder: Where they are.
        teacher: `fingerprint` of the teacher that they must be of.

    Raises:
        CacheError: The folder holds no cache, a damaged one, or one of another teacher.
    """

    def __init__(self, folder: str | Path, teacher: str) -> None:
        self.folder = Path(folder)
        advice = f"delete {self.folder} to fill it anew, or set another teacher_cache"
        try:
            meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            stored, version, digest = meta["teacher"], meta["version"], meta["digest"]
            self._keys = np.load(self.folder / "keys.npy", mmap_mode="r")
            self._logits = np.load(self.folder / "logits.npy", mmap_mode="r")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"{self.folder} is no whole teacher cache ({error}): {advice}"
            ) from error
        if version != _VERSION or stored != teacher:
            raise CacheError(
                f"{self.folder} holds the outputs of another teacher ({stored}, this one is "
                f"{teacher}), or of the same one with other weights or labels: {advice}"
            )
        if len(self._keys) != len(self._logits) or digest != _digest(self._keys, self._logits):
            raise CacheError(f"{self.folder} has changed since it was written: {advice}")

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, keys: Tensor) -> Tensor | None:
        """Return the logits of a batch, `[batch, classes]` float32, or None where one is missing.

        Args:
            keys: `[batch, 2]` int64.
        """
        wanted = keys.cpu().numpy()
        rows = np.searchsorted(self._keys[:, 0], wanted[:, 0])
        rows = np.minimum(rows, len(self._keys) - 1)
        if not (self._keys[rows] == wanted).all():
            return None
        return torch.from_numpy(self._logits[rows]).to(keys.device)

    @staticmethod
    def write(folder: str | Path, teacher: str, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Write a cache in one step: a crash leaves none.

        Args:
            folder: Where to; its parents are made.
            teacher: `fingerprint` of the teacher.
            batches: Keys `[batch, 2]` int64 and logits `[batch, classes]`.

        Raises:
            CacheError: The folder holds something else.
        """
        folder = Path(folder)
        if folder.exists():
            raise CacheError(f"{folder} exists and is no teacher cache: set another teacher_cache")
        pairs = [(k.cpu().numpy(), v.float().cpu().numpy()) for k, v in batches]
        keys = np.concatenate([k for k, _ in pairs])
        logits = np.concatenate([v for _, v in pairs])
        keys, first = np.unique(keys, axis=0, return_index=True)
        logits = logits[first]
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}")
        temporary.mkdir(parents=True)
        try:
            np.save(temporary / "keys.npy", keys)
            np.save(temporary / "logits.npy", logits)
            meta = {"version": _VERSION, "teacher": teacher, "digest": _digest(keys, logits)}
            (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        logger.info(f"teacher cache of {len(keys):,} examples in {folder}")


def _digest(*arrays: np.ndarray) -> str:
    state = xxhash.xxh3_128()
    for array in arrays:
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()
