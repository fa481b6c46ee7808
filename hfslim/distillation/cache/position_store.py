"""A teacher's hidden states on disk, without padding."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

__all__ = ["PositionStore", "PositionWriter"]

_ROWS, _COUNTS = "positions.f32", "counts.npy"


class PositionWriter:
    """Writes the hidden states of examples into a folder, batch by batch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._counts: list[np.ndarray] = []
        self._file: Any = None

    def __enter__(self) -> Self:
        self._file = (self._folder / _ROWS).open("wb")
        return self

    def add(self, values: Tensor, mask: Tensor) -> None:
        """Write a batch.

        Args:
            values: `[batch, positions, features]`.
            mask: `[batch, positions]` bool.
        """
        self._counts.append(mask.sum(-1).cpu().numpy())
        self._file.write(values.float()[mask].cpu().numpy().tobytes())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None:
            np.save(self._folder / _COUNTS, np.concatenate(self._counts))


class PositionStore:
    """Reads the files of a `PositionWriter`, memory-mapped.

    Args:
        folder: Their folder.
        width: Features of a position.

    Raises:
        OSError: A file is missing.
        ValueError: The files do not fit each other.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.counts = np.load(folder / _COUNTS, mmap_mode="r")
        self.rows = np.memmap(folder / _ROWS, np.float32, "r").reshape(-1, width)
        self._ends = np.cumsum(self.counts)
        if self._ends[-1] != len(self.rows):
            raise ValueError(f"{len(self.rows)} positions of {self._ends[-1]}")

    def read(self, examples: np.ndarray, mask: Tensor) -> Tensor | None:
        """Return examples as one batch, 0 where a position does not count.

        Args:
            examples: Numbers in the order of writing, `[batch]`.
            mask: `[batch, positions]` bool.

        Returns:
            `[batch, positions, features]`, or None if the mask counts other positions than were
            written.
        """
        if (self.counts[examples] != mask.sum(-1).cpu().numpy()).any():
            return None
        parts = [self.rows[self._ends[i] - self.counts[i] : self._ends[i]] for i in examples]
        whole = torch.zeros(*mask.shape, self.rows.shape[-1], device=mask.device)
        whole[mask] = torch.from_numpy(np.concatenate(parts)).to(mask.device)
        return whole
