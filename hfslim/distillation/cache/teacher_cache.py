"""A teacher's logits and hidden states on disk, found by the keys of examples."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from transformers.utils import logging

from hfslim.distillation.cache.position_store import PositionStore, PositionWriter
from hfslim.reporting.staged_writes import whole_folder

__all__ = ["CacheError", "CachedBatch", "TeacherCache", "TopK"]

logger = logging.get_logger(__name__)

_VERSION = 2


class CacheError(ValueError):
    """A teacher cache is damaged, or holds another teacher's outputs."""


@dataclass(frozen=True)
class TopK:
    """The logits of the k most probable classes, and one logit for all other classes.

    The other classes share one logit that preserves their total probability at `temperature`. So
    the k probabilities are the teacher's own. Probabilities that are normalised over k classes
    alone would be too large and make the student overconfident (Anshumann et al. 2025, arXiv
    2503.16870).

    Attributes:
        k: Number of classes, from 1 to one less than all.
        temperature: The temperature at which the probabilities are exact.
    """

    k: int
    temperature: float

    def keep(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Reduce logits `[batch, classes]` to the largest.

        Returns:
            `[batch, k + 1]` float32, the largest logits and then that of each other class; and the
            classes of the largest, `[batch, k]` int32.

        Examples:
            >>> values, classes = TopK(1, 1.0).keep(torch.tensor([[0.5, 0.2, 0.3]]).log())
            >>> values.exp(), classes
            (tensor([[0.5000, 0.2500]]), tensor([[0]], dtype=torch.int32))
        """
        logits = logits.float()
        largest = logits.topk(self.k, dim=-1)
        rest = logits.scatter(-1, largest.indices, -torch.inf) / self.temperature
        share = rest.logsumexp(-1, keepdim=True) - math.log(logits.shape[-1] - self.k)
        return torch.cat([largest.values, share * self.temperature], -1), largest.indices.int()

    @staticmethod
    def fill(values: Tensor, classes: Tensor, number: int) -> Tensor:
        """Return logits for all classes, `[batch, number]`, from the results of `keep`.

        Examples:
            >>> TopK.fill(torch.tensor([[2.0, -1.0]]), torch.tensor([[1]], dtype=torch.int32), 3)
            tensor([[-1.,  2., -1.]])
        """
        whole = values[:, -1:].repeat(1, number)
        return whole.scatter_(-1, classes.long(), values[:, :-1])


@dataclass(frozen=True)
class CachedBatch:
    """A teacher's outputs on a batch, as a cache keeps them.

    Attributes:
        keys: `[batch, 2]` int64.
        logits: `[batch, classes]`.
        positions: Hidden states `[batch, positions, features]`, if they are kept.
        mask: `[batch, positions]`, 1 where a position counts.
    """

    keys: Tensor
    logits: Tensor
    positions: Tensor | None = None
    mask: Tensor | None = None


class TeacherCache:
    """One teacher's logits, all or the largest, and hidden states, memory-mapped.

    Args:
        folder: Folder of the cache.
        teacher: The identity that the cache must have: the teacher's fingerprint and the settings.

    Raises:
        CacheError: The folder holds no cache, a damaged one, or one of another identity.
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
                f"{teacher}), or of the same teacher with other weights, labels or settings of "
                f"what is kept: {advice}"
            )
        if digest != _digest(self.folder):
            raise CacheError(f"{self.folder} has changed since it was written: {advice}")

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, keys: Tensor) -> np.ndarray | None:
        """Return the numbers of a batch's examples by their keys, or None if one is missing."""
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
        """Return hidden states as `PositionStore.read`, or None if they are not kept."""
        return None if self._positions is None else self._positions.read(examples, mask)

    @staticmethod
    def write(
        folder: str | Path, teacher: str, batches: Iterable[CachedBatch], top_k: TopK | None = None
    ) -> None:
        """Write a whole cache or none.

        Args:
            folder: A new folder.
            teacher: The identity of the cache.
            batches: The teacher's outputs, all with positions or all without.
            top_k: The reduction of the logits, if any.

        Raises:
            CacheError: The folder exists.
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
            logger.warning(f"another run has filled {folder} in the meantime; it is read")
            return
        logger.info(f"teacher cache of {meta['examples']:,} examples in {folder}")


def _write(folder: Path, batches: Iterable[CachedBatch], top_k: TopK | None) -> dict[str, Any]:
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
