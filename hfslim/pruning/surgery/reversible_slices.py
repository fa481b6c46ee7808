"""Cut tensors so that they can be made whole again, without holding anything twice."""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class _Part:
    """What a tensor that was cut along one dimension is made whole from.

    Attributes:
        tensor: The tensor, empty now.
        kept: What stays of it.
        gone: What does not.
        dim: The dimension.
        index: Where along it what stays was.
        stride: Its layout.
    """

    tensor: weakref.ref[torch.Tensor]
    kept: torch.Tensor
    gone: torch.Tensor
    dim: int
    index: torch.Tensor
    stride: tuple[int, ...]

    def joined(self, kept: torch.Tensor) -> torch.Tensor:
        """Put what stays and what does not together again."""
        size = kept.shape[self.dim] + self.gone.shape[self.dim]
        shape = [*kept.shape[: self.dim], size, *kept.shape[self.dim + 1 :]]
        whole = torch.empty_strided(shape, self.stride, dtype=kept.dtype, device=kept.device)
        whole.index_copy_(self.dim, self.index, kept)
        return whole.index_copy_(self.dim, _others(self.index, size), self.gone)


class Parted:
    """The tensors of a model that were cut, each left empty beside its two parts.

    A cut copies what stays; with what goes beside that, the tensor itself is needed no more, so the
    model and its cut version take the memory of one. Objects stay what they are: who is made whole
    again has all values as they were, bit for bit. Tensors that do not have their memory for
    themselves stay whole.

    Args:
        model: The model.
        sparing: Whether to empty tensors at all. If not, they stay where they are in memory.
    """

    def __init__(self, model: nn.Module, sparing: bool) -> None:
        self._sparing = sparing
        tensors = (*model.parameters(), *model.buffers())
        self._users = Counter(one.untyped_storage().data_ptr() for one in tensors)
        self._parts: dict[int, _Part] = {}

    def select(self, tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
        """Return what stays of a tensor, a parameter of a parameter, and empty the tensor.

        Args:
            tensor: A parameter or buffer of the model, whole or cut before. The caller holds on to
                it until it calls `restore` or `let_go`.
            dim: The dimension to cut along.
            index: What stays, by number, each once.
        """
        data = self.whole(tensor)
        index = index.to(data.device)
        kept = data.index_select(dim, index)
        if isinstance(tensor, nn.Parameter):
            kept = nn.Parameter(kept, requires_grad=tensor.requires_grad)
        if id(tensor) not in self._parts and self._has_own_memory(data):
            gone = data.index_select(dim, _others(index, data.shape[dim]))
            part = _Part(weakref.ref(tensor), kept, gone, dim, index, data.stride())
            # First noted, then emptied: an interrupt between the two loses nothing.
            self._parts[id(tensor)] = part
            tensor.data = data.new_empty(0)
        return kept

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the values of a tensor as they were before it was emptied, if it was."""
        part = self._parts.get(id(tensor))
        return tensor.detach() if part is None else part.joined(self.whole(part.kept))

    def restore_used(self, model: nn.Module) -> None:
        """Make whole again what a model still uses, after all its cuts."""
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) in self._parts:
                self._settle(id(tensor))

    def restore(self) -> None:
        """Make all tensors whole again; what was cut last comes first."""
        while self._parts:
            self._settle(next(reversed(self._parts)))

    def let_go(self) -> None:
        """Forget what is gone, for good; make whole what others than the model still hold."""
        while self._parts:
            self._settle(next(iter(self._parts)))
        return_memory()

    def _settle(self, key: int) -> None:
        """Make a tensor whole, if anybody has it, and forget its parts."""
        tensor = self._parts[key].tensor()
        if tensor is not None:
            tensor.data = self.whole(tensor)
        del self._parts[key]

    def _has_own_memory(self, data: torch.Tensor) -> bool:
        storage = data.untyped_storage()
        alone = self._users[storage.data_ptr()] <= 1
        return self._sparing and alone and storage.nbytes() == data.numel() * data.element_size()


def _others(index: torch.Tensor, size: int) -> torch.Tensor:
    """Return the numbers below a size that are not in an index."""
    others = torch.ones(size, dtype=torch.bool, device=index.device)
    others[index] = False
    return others.nonzero().flatten()


def return_memory() -> None:
    """Give the system back what is free between memory in use, which glibc keeps otherwise."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
