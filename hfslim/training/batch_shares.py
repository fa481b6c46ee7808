"""Which examples of a step's batches count on this process.

Where examples do not divide evenly, accelerate repeats some, so that all processes have equally
many. A Trainer that weighs every example the same leaves the repeated ones out; a process without
any other still runs one of them, with weight 0.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard, SkipBatchSampler
from accelerate.state import GradientState
from torch import nn
from torch.utils.data import IterableDataset
from transformers.trainer_pt_utils import find_batch_size

from hfslim.anatomy.adapters import base_of

__all__ = ["Share", "count_stream", "keep_first", "real_examples", "running", "share_of"]


@dataclass(frozen=True)
class Share:
    """The part of a step's loss that the batch of this process makes up.

    Attributes:
        weight: Factor of each example's loss, before gradients are averaged over processes.
        counts: Whether the batch holds examples of this process, and not a repeated one.
    """

    weight: float
    counts: bool


_RUNNING: WeakKeyDictionary[nn.Module, Share] = WeakKeyDictionary()


def share_of(model: nn.Module) -> Share | None:
    """Return the share of the batch that a model runs now; None outside of `running`."""
    return _RUNNING.get(base_of(model))


@contextmanager
def running(model: nn.Module, share: Share) -> Iterator[None]:
    """Set the share of the batch that a model runs inside the block."""
    base = base_of(model)
    _RUNNING[base] = share
    try:
        yield
    finally:
        del _RUNNING[base]


class _CountedStream(IterableDataset[Any]):
    """A stream that each process reads whole and takes its share of.

    accelerate does not know how many examples of its last batches are repeated, until this sets it.
    """

    def __init__(self, stream: Any, together: int) -> None:
        self.stream, self.together = stream, together

    def __iter__(self) -> Iterator[Any]:
        count = 0
        for count, example in enumerate(self.stream, 1):  # noqa: B007
            yield example
        loader: Any = GradientState().active_dataloader
        if loader is not None:
            loader.remainder = count % self.together

    def __len__(self) -> int:
        return len(self.stream)

    def __getattr__(self, name: str) -> Any:
        if name == "stream":
            raise AttributeError(name)
        return getattr(self.stream, name)


def count_stream(loader: Any) -> Any:
    """Let a loader of a stream without `dispatch_batches` know which examples it repeats.

    Raises:
        ValueError: The stream is read by several workers, whose last batches all repeat examples.
    """
    shard = getattr(loader, "dataset", None)
    if not isinstance(shard, IterableDatasetShard) or shard.num_processes == 1:
        return loader
    if loader.num_workers > 0:
        raise ValueError(
            f"dispatch_batches=False with dataloader_num_workers={loader.num_workers}: each worker "
            "would repeat examples of its stream to fill its last batch; set "
            "dataloader_num_workers=0 or dispatch_batches=True"
        )
    parts = 1 if shard.split_batches else shard.num_processes
    shard.dataset = _CountedStream(shard.dataset, shard.batch_size * parts)
    return loader


def real_examples(accelerator: Accelerator, size: int) -> int:
    """Return how many examples of the last fetched batch, from its start, are not repeated.

    The size is the number of examples in the batch, the same on all processes.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader:
        return size
    remainder = _remainder(state)
    if remainder <= 0:
        return size
    return min(max(remainder - accelerator.process_index * size, 0), size)


def _remainder(state: GradientState) -> int:
    """Return how many examples the last batches of all processes hold; 0 or less if they are full.

    accelerate does not know it where batches are skipped, in the epoch in which training resumes.
    """
    loader: Any = state.active_dataloader
    skipping = getattr(loader, "batch_sampler", None)
    if state.remainder >= 0 or not isinstance(skipping, SkipBatchSampler):
        return state.remainder
    whole = skipping.batch_sampler
    if whole.drop_last:
        return 0
    parts = 1 if whole.split_batches else whole.num_processes
    return len(loader.dataset) % (whole.batch_size * parts)


def keep_first(batch: MutableMapping[str, Any], examples: int) -> None:
    """Keep the first examples of a batch, in place."""
    size = find_batch_size(batch)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == size:
            batch[name] = value[:examples]
