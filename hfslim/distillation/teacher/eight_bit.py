"""Weights of a teacher in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.utils import logging

__all__ = ["to_int8"]

logger = logging.get_logger(__name__)

_WHOLE = {"modules_to_save", "original_module"}
"""Where PEFT keeps an adapter's own head: small, and copied by what it is rather than as it is."""


class _Int8Rows(nn.Module):
    """A matrix as 8-bit numbers and one scale for each row, the largest of which is 127."""

    def forward(self, numbers: Tensor, scales: Tensor) -> Tensor:
        return numbers.to(scales.dtype) * scales

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scales = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / 127
        return (weight / scales).round().clamp(-127, 127).to(torch.int8), scales


def to_int8(model: nn.Module) -> nn.Module:
    """Keep the weights of a model's linear maps in 8 bits, in place, one scale for each output.

    Each is widened for the moment in which it is used, so that the model computes in the dtype that
    it had, on any device: memory is saved, a quarter of float32 is left of them, and no time.

    Args:
        model: A frozen model.

    Returns:
        The same model.
    """
    maps = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not _WHOLE & set(path.split("."))
    ]
    for module in maps:
        if module.weight.is_floating_point() and not parametrize.is_parametrized(module, "weight"):
            parametrize.register_parametrization(module, "weight", _Int8Rows())
    logger.info(f"{len(maps)} linear maps of {type(model).__name__} keep their weights in 8 bits")
    return model
