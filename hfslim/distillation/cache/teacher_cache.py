"""A teacher's logits and hidden states on disk, found by the keys of examples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from transformers.utils import logging

from hfslim.reporting.staged_writes import whole_folder

__all__ = ["CacheError", "CachedBatch", "TeacherCache", "TopK"]

logger = logging.get_logger(__name__)

_VERSION = 2
_ROWS = "positions.f32"
"""Hidden states at the positions that count, `[all positions, width]`."""


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
        self._classes = self._rows = None
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
                self._counts = np.load(self.folder / "counts.npy", mmap_mode="r")
                self._rows = np.memmap(self.folder / _ROWS, np.float32, "r").reshape(-1, width)
                self._ends = np.cumsum(self._counts)
                if self._ends[-1] != len(self._rows):
                    raise ValueError(f"{len(self._rows)} positions of {self._ends[-1]}")
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
        """Return the hidden states of examples that were found, 0 where a position does not count.

        Args:
            examples: The result of `find`.
            mask: `[batch, positions]` bool.

        Returns:
            `[batch, positions, features]`; None if no hidden states are kept, or those of other
            positions than the mask counts.
        """
        if self._rows is None or (self._counts[examples] != mask.sum(-1).cpu().numpy()).any():
            return None
        parts = [self._rows[self._ends[i] - self._counts[i] : self._ends[i]] for i in examples]
        whole = torch.zeros(*mask.shape, self._rows.shape[-1], device=mask.device)
        whole[mask] = torch.from_numpy(np.concatenate(parts)).to(mask.device)
        return whole

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
    """Write the arrays of a cache, hidden states batch by batch, and return their description."""
    arrays: dict[str, list[Tensor]] = {}
    classes = width = 0
    for batch in batches:
        values, classes = {"keys": batch.keys, "logits": batch.logits.float()}, len(batch.logits[0])
        if top_k is not None:
            values["logits"], values["classes"] = top_k.keep(batch.logits)
        if batch.positions is not None and batch.mask is not None:
            mask, width = batch.mask.bool(), batch.positions.shape[-1]
            values["counts"] = mask.sum(-1)
            with (folder / _ROWS).open("ab") as file:
                file.write(batch.positions.float()[mask].cpu().numpy().tobytes())
        for name, value in values.items():
            arrays.setdefault(name, []).append(value.cpu())
    whole = {name: torch.cat(parts).numpy() for name, parts in arrays.items()}
    whole["keys"], whole["order"] = np.unique(whole["keys"], axis=0, return_index=True)
    for name, array in whole.items():
        np.save(folder / f"{name}.npy", array)
    kept = top_k and asdict(top_k)
    return {"examples": len(whole["keys"]), "classes": classes, "top_k": kept, "width": width}


def _digest(folder: Path) -> str:
    state = xxhash.xxh3_128()
    for path in sorted(folder.iterdir()):
        if path.name != "meta.json" and path.stat().st_size:
            state.update(path.name.encode())
            state.update(np.memmap(path, np.uint8, "r").data)
    return state.hexdigest()
