"""The weights of a teacher: in 8 bits, sharded, apart from the student's, hashed."""

from __future__ import annotations

from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from transformers.utils import logging

from hfslim.anatomy.layer_modules import modules_to_shard

__all__ = ["check_apart", "fingerprint", "shard_teacher", "storage_of", "to_int8"]

logger = logging.get_logger(__name__)

_WHOLE = {"modules_to_save", "original_module"}
"""PEFT's names of an adapter's own head, which it copies without parametrizations."""


class _Int8Rows(nn.Module):
    """A matrix as 8-bit numbers, at most 127, and one scale for each row."""

    def forward(self, numbers: Tensor, scales: Tensor) -> Tensor:
        return numbers.to(scales.dtype) * scales

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scales = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / 127
        return (weight / scales).round().clamp(-127, 127).to(torch.int8), scales


def to_int8(model: nn.Module) -> nn.Module:
    """Store the weights of a frozen model's linear layers in 8 bits, in place, and return it.

    Each weight is converted back when it is used, so that the model computes in its own dtype on
    any device. This saves memory (a quarter of float32 remains), not time.
    """
    layers = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not _WHOLE & set(path.split("."))
    ]
    for module in layers:
        if module.weight.is_floating_point() and not parametrize.is_parametrized(module, "weight"):
            parametrize.register_parametrization(module, "weight", _Int8Rows())
    logger.info(
        f"{len(layers)} linear layers of {type(model).__name__} store their weights in 8 bits"
    )
    return model


def shard_teacher(teacher: torch.nn.Module, device: torch.device) -> None:
    """Shard a teacher's weights over all processes, in place.

    A layer's weights are gathered while it runs, so all processes must run the teacher at the same
    time, each on its own batch. The student may be sharded in any way.

    Args:
        teacher: Frozen, in floating point; it may share no weight with another model.
        device: The device of this process's part, on which the teacher runs.

    References:
        Zhao et al., PyTorch FSDP, 2023, arXiv:2304.11277; here in its second form, `fully_shard`.
    """
    name = type(teacher).__name__
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    parts = [*modules_to_shard(teacher), teacher]
    empty = {parameter for parameter in teacher.parameters() if not parameter.numel()}
    options: dict[str, Any] = {"ignored_params": empty} if empty else {}  # From torch 2.7 on.
    for module in parts:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, **options)
    teacher.to(device)
    logger.info(
        f"the teacher {name} is sharded over {mesh.size()} processes, in {len(parts)} parts"
    )


def check_apart(name: str, teacher: nn.Module, student: nn.Module) -> None:
    """Raise ValueError if the teacher holds weights that the student trains."""
    trained = {
        storage_of(parameter): path
        for path, parameter in student.named_parameters()
        if parameter.requires_grad and parameter.numel() and not parameter.is_meta
    }
    shared = [
        trained[place]
        for parameter in teacher.parameters()
        if not parameter.is_meta and (place := storage_of(parameter)) in trained
    ]
    if shared:
        raise ValueError(
            f"The teacher {name} holds {len(shared)} weights that the student trains, such as "
            f"{shared[0]}: pass its folder, or copy.deepcopy of the model before it became the "
            "student."
        )


def storage_of(tensor: Tensor) -> int:
    """Return the memory address of a tensor, or of this process's part of it."""
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part.untyped_storage().data_ptr()


def fingerprint(teacher: nn.Module, order: Tensor | None) -> str:
    """Hash a teacher's weights and the order of its labels (the result of `align_labels`)."""
    state = xxhash.xxh3_128()
    for name, value in sorted(teacher.state_dict().items()):
        state.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        if type(value) not in (Tensor, nn.Parameter):
            value = value.dequantize()
        state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    state.update(str(None if order is None else order.tolist()).encode())
    return state.hexdigest()
