"""Communication between the ranks of a launch; without a process group there is one rank.

By torch.distributed and not by accelerate, whose `PartialState` starts a process group where the
caller has none, and does not see a group that was started without the launcher's variables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed

__all__ = ["add_over_ranks", "from_all_ranks", "from_first_rank", "rank", "rank_count"]

T = TypeVar("T")


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Return the rank of this process."""
    return distributed.get_rank() if _grouped() else 0


def rank_count() -> int:
    """Return the number of ranks."""
    return distributed.get_world_size() if _grouped() else 1


def add_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Add up a tensor of all ranks, in place and in its own dtype, and return it.

    NCCL adds on the GPU: a tensor on the CPU is copied there and back.
    """
    if not _grouped():
        return tensor
    if distributed.get_backend() == "nccl" and tensor.device.type == "cpu":
        moved = tensor.cuda()
        distributed.all_reduce(moved)
        return tensor.copy_(moved)
    distributed.all_reduce(tensor)
    return tensor


def from_first_rank(compute: Callable[[], T]) -> T:
    """Call a function on the first rank only and return its picklable result on all."""
    shared: list[Any] = [compute() if rank() == 0 else None]
    if _grouped():
        distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def from_all_ranks(value: T) -> list[T]:
    """Return the picklable values of all ranks, in their order, on every rank."""
    values: list[Any] = [value] * rank_count()
    if _grouped():
        distributed.all_gather_object(values, value)
    return values
