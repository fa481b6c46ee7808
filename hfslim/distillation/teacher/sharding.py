"""A frozen teacher in parts: each process holds its share of every weight."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.utils import logging

__all__ = ["shard_teacher"]

logger = logging.get_logger(__name__)


def shard_teacher(teacher: torch.nn.Module, device: torch.device) -> None:
    """Split a teacher's weights over all processes, in place.

    A layer's weights are put together when it runs and let go of behind it, so the processes must
    run the teacher at the same time, each on its own batch. It does not matter what splits the
    student.

    Args:
        teacher: Frozen, in floating point; no weight may be another model's too.
        device: Where this process keeps its share, and where the teacher runs.

    References:
        Zhao et al., PyTorch FSDP, 2023, arXiv:2304.11277; this is its second form, `fully_shard`.
    """
    name = type(teacher).__name__
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    blocks = set(getattr(teacher, "_no_split_modules", None) or ())
    layers = [module for module in teacher.modules() if type(module).__name__ in blocks]
    for module in (*layers, teacher):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    teacher.to(device)
    logger.info(
        f"the teacher {name} is split over {mesh.size()} processes, in {len(layers) + 1} parts"
    )
