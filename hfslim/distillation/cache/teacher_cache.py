"""A teacher's answers on disk, found by what an example holds."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from transformers.utils import logging

from hfslim.distillation.cache.augmentation import random_state
from hfslim.distillation.cache.position_store import PositionStore, PositionWriter
from hfslim.distillation.cache.top_k import TopK
from hfslim.reporting.staged_writes import whole_folder
from hfslim.tasks.pairing import PREFIX, own_inputs

__all__ = ["KEYS", "Answers", "CacheError", "KeyedCollator", "TeacherCache", "fingerprint"]

logger = logging.get_logger(__name__)

KEYS = "teacher_cache_keys"
"""Name under which a batch carries its examples' keys, `[batch, 2]` int64."""
_LABELS = ("label", "label_ids", "labels")
_VERSION = 2


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
        before = random_state()
        batch = self.collator(features)
        if not self.teacher_alone and random_state() != before:
            raise CacheError(
                f"the collator {type(self.collator).__name__} draws random numbers, as mixup does, "
                "so that a batch is not what its examples are known by: let the data set change "
                "examples when they are read, or leave teacher_cache out."
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
        if type(value) not in (Tensor, nn.Parameter):
            value = value.dequantize()
        state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    state.update(str(None if order is None else order.tolist()).encode())
    return state.hexdigest()


@dataclass(frozen=True)
class Answers:
    """What a teacher says of a batch.

    Attributes:
        keys: `[batch, 2]` int64.
        logits: `[batch, classes]`.
        positions: What it computes inside, `[batch, positions, features]`, where that is kept.
        mask: Which positions count, `[batch, positions]`, 1 or 0.
    """

    keys: Tensor
    logits: Tensor
    positions: Tensor | None = None
    mask: Tensor | None = None


class TeacherCache:
    """The answers of one teacher, memory-mapped: logits, all or the largest, and hidden states.

    Args:
        folder: Where they are.
        teacher: What they must be of: the `fingerprint` of the teacher, and what is kept.

    Raises:
        CacheError: The folder holds no cache, a damaged one, or one of another teacher or of other
            settings.
    """

    def __init__(self, folder: str | Path, teacher: str) -> None:
        self.folder = Path(folder)
        advice = f"delete {self.folder} to fill it anew, or set another teacher_cache"
        self._classes = self._positions = None
        try:
            meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            stored, version, digest = meta["teacher"], meta["version"], meta["digest"]
            self._number, width = meta["classes"], meta["width"]
            self._keys = np.load(self.folder / "keys.npy", mmap_mode="r")
            self._order = np.load(self.folder / "order.npy", mmap_mode="r")
            self._logits = np.load(self.folder / "logits.npy", mmap_mode="r")
            if meta["top_k"]:
                self._classes = np.load(self.folder / "classes.npy", mmap_mode="r")
            if width:
                self._positions = PositionStore(self.folder, width)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"{self.folder} is no whole teacher cache ({error}): {advice}"
            ) from error
        if version != _VERSION or stored != teacher:
            raise CacheError(
                f"{self.folder} holds the outputs of another teacher ({stored}, this one is "
                f"{teacher}), or of the same one with other weights, labels or settings of what is "
                f"kept: {advice}"
            )
        if digest != _digest(self.folder):
            raise CacheError(f"{self.folder} has changed since it was written: {advice}")

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, keys: Tensor) -> np.ndarray | None:
        """Return where the examples of a batch are, `[batch]`, or None where one is missing.

        Args:
            keys: `[batch, 2]` int64.
        """
        wanted = keys.cpu().numpy()
        rows = np.searchsorted(self._keys[:, 0], wanted[:, 0])
        rows = np.minimum(rows, len(self._keys) - 1)
        return self._order[rows] if (self._keys[rows] == wanted).all() else None

    def logits(self, examples: np.ndarray) -> Tensor:
        """Return the logits of examples that were found, `[batch, classes]` float32."""
        values = torch.from_numpy(self._logits[examples])
        if self._classes is None:
            return values
        return TopK.fill(values, torch.from_numpy(self._classes[examples]), self._number)

    def positions(self, examples: np.ndarray, mask: Tensor) -> Tensor | None:
        """Return what the teacher computes inside, as `PositionStore.read`."""
        return None if self._positions is None else self._positions.read(examples, mask)

    @staticmethod
    def write(
        folder: str | Path, teacher: str, batches: Iterable[Answers], top_k: TopK | None = None
    ) -> None:
        """Write a cache in one step: a crash leaves none.

        Args:
            folder: Where to; its parents are made.
            teacher: What the answers are of.
            batches: Of the teacher, all with positions or all without.
            top_k: What to keep of the logits, if not all.

        Raises:
            CacheError: The folder holds something else.
        """
        folder = Path(folder)
        if folder.exists():
            raise CacheError(f"{folder} exists and is no teacher cache: set another teacher_cache")
        try:
            with whole_folder(folder) as staged:
                meta = _write(staged, batches, top_k)
                meta |= {"version": _VERSION, "teacher": teacher, "digest": _digest(staged)}
                (staged / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        except OSError:
            if not folder.exists():
                raise
            logger.warning(f"another run has filled {folder} meanwhile, which is read instead")
            return
        logger.info(f"teacher cache of {meta['examples']:,} examples in {folder}")


def _write(folder: Path, batches: Iterable[Answers], top_k: TopK | None) -> dict[str, Any]:
    arrays: dict[str, list[np.ndarray]] = {"keys": [], "logits": [], "classes": []}
    writer: PositionWriter | None = None
    classes = width = 0
    stream = iter(batches)
    first = next(stream)
    if first.positions is not None:
        writer, width = PositionWriter(folder), first.positions.shape[-1]
    with writer or nullcontext():
        for batch in itertools.chain([first], stream):
            logits, classes = batch.logits.float(), batch.logits.shape[-1]
            if top_k is not None:
                logits, largest = top_k.keep(logits)
                arrays["classes"].append(largest.cpu().numpy())
            arrays["keys"].append(batch.keys.cpu().numpy())
            arrays["logits"].append(logits.cpu().numpy())
            if writer is not None and batch.positions is not None and batch.mask is not None:
                writer.add(batch.positions, batch.mask.bool())
    whole = {name: np.concatenate(parts) for name, parts in arrays.items() if parts}
    whole["keys"], whole["order"] = np.unique(whole["keys"], axis=0, return_index=True)
    for name, array in whole.items():
        np.save(folder / f"{name}.npy", array)
    return {
        "examples": len(whole["keys"]),
        "classes": classes,
        "top_k": top_k and asdict(top_k),
        "width": width,
    }


def _digest(folder: Path) -> str:
    state = xxhash.xxh3_128()
    for path in sorted(folder.iterdir()):
        if path.name != "meta.json" and path.stat().st_size:
            state.update(path.name.encode())
            state.update(np.memmap(path, np.uint8, "r").data)
    return state.hexdigest()
