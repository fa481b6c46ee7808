"""Slices of tensors that can be undone, without a second copy of the tensors."""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class _Slice:
    """The two parts of a tensor that was sliced along `dim`, kept at `index`, and is empty now."""

    tensor: weakref.ref[torch.Tensor]
    kept: torch.Tensor
    removed: torch.Tensor
    dim: int
    index: torch.Tensor
    stride: tuple[int, ...]

    def joined(self, kept: torch.Tensor) -> torch.Tensor:
        """Return the whole tensor, given its kept entries."""
        size = kept.shape[self.dim] + self.removed.shape[self.dim]
        shape = [*kept.shape[: self.dim], size, *kept.shape[self.dim + 1 :]]
        whole = torch.empty_strided(shape, self.stride, dtype=kept.dtype, device=kept.device)
        whole.index_copy_(self.dim, self.index, kept)
        return whole.index_copy_(self.dim, _others(self.index, size), self.removed)


class ReversibleSlices:
    """The tensors of a model that were sliced, each emptied and stored as its two parts.

    The kept and the removed entries together hold all values, so the original model and its cut
    version take the memory of one. A restored tensor is the same object with the same values, bit
    for bit. Tensors that share their memory are not emptied.

    Unless `sparing`, no tensor is emptied, and all stay at their places in memory.
    """

    def __init__(self, model: nn.Module, sparing: bool) -> None:
        self._sparing = sparing
        tensors = (*model.parameters(), *model.buffers())
        self._users = Counter(one.untyped_storage().data_ptr() for one in tensors)
        self._slices: dict[int, _Slice] = {}

    def select(self, tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
        """Return the kept entries of a parameter or buffer, and empty it.

        The caller keeps a reference to the tensor until it calls `restore` or `discard`.
        """
        data = self.whole(tensor)
        index = index.to(data.device)
        kept = data.index_select(dim, index)
        if isinstance(tensor, nn.Parameter):
            kept = nn.Parameter(kept, requires_grad=tensor.requires_grad)
        if id(tensor) not in self._slices and self._has_own_memory(data):
            removed = data.index_select(dim, _others(index, data.shape[dim]))
            one = _Slice(weakref.ref(tensor), kept, removed, dim, index, data.stride())
            # Stored before the tensor is emptied: an interrupt between the two loses nothing.
            self._slices[id(tensor)] = one
            tensor.data = data.new_empty(0)
        return kept

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the values of a tensor before it was emptied, or of one that was not."""
        one = self._slices.get(id(tensor))
        return tensor.detach() if one is None else one.joined(self.whole(one.kept))

    def restore_used(self, model: nn.Module) -> None:
        """Restore the sliced tensors that the cut model still uses."""
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) in self._slices:
                self._settle(id(tensor))

    def restore(self) -> None:
        """Restore all tensors, in reverse order."""
        while self._slices:
            self._settle(next(reversed(self._slices)))

    def discard(self) -> None:
        """Discard all removed entries; restore tensors that are referenced outside the model."""
        while self._slices:
            self._settle(next(iter(self._slices)))
        return_memory()

    def _settle(self, key: int) -> None:
        """Restore a tensor, if it still exists, and discard its parts."""
        tensor = self._slices[key].tensor()
        if tensor is not None:
            tensor.data = self.whole(tensor)
        del self._slices[key]

    def _has_own_memory(self, data: torch.Tensor) -> bool:
        storage = data.untyped_storage()
        alone = self._users[storage.data_ptr()] <= 1
        return self._sparing and alone and storage.nbytes() == data.numel() * data.element_size()


def _others(index: torch.Tensor, size: int) -> torch.Tensor:
    """Return the indices below a size that are not in `index`."""
    others = torch.ones(size, dtype=torch.bool, device=index.device)
    others[index] = False
    return others.nonzero().flatten()


def return_memory() -> None:
    """Return free heap memory, which glibc would keep, to the system."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
