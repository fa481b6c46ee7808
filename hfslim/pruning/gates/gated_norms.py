"""Norms whose statistics exclude closed dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Mask = Callable[[torch.Tensor], torch.Tensor | None]
"""From a norm's input to 1 for open and 0 for closed dimensions, or None if all are open."""


class GatedNorm:
    """Makes a norm compute its statistics over the open dimensions, as the smaller norm would.

    A norm over `d` features of which `k` are open gets `√(d/k) · (x − mean of the open)`, zero
    where closed. Its mean is then 0 and its mean square that of the open features, and its output,
    without the bias, is `√(d/k)` times too large, which is corrected. Whether a norm subtracts the
    mean (an RMS norm does not) is tested by running it.

    Args:
        norm: The norm, of any class, over the last dimension.
    """

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm
        self._centres: bool | None = None
        self._open: list[torch.Tensor | None] = []

    def attach(self, mask: Mask) -> list[RemovableHandle]:
        """Register the hooks; returns their handles."""

        def enter(_: nn.Module, args: tuple) -> tuple | None:
            value, *rest = args
            found = mask(value)
            self._open.append(found)
            if found is None:
                return None
            if self.centres:
                value = value - (value * found).sum(-1, keepdim=True) / found.sum()
            return (value * found / found.mean().sqrt(), *rest)

        def leave(_: nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor:
            found = self._open.pop()
            if found is None:
                return output
            bias: Any = getattr(self.norm, "bias", None)
            if bias is None:
                return output * found.mean().sqrt()
            return (output - bias) * found.mean().sqrt() + bias

        return [self.norm.register_forward_pre_hook(enter), self.norm.register_forward_hook(leave)]

    @property
    def centres(self) -> bool:
        """Whether the norm subtracts the mean."""
        if self._centres is None:
            weight = self.norm.get_parameter("weight")
            with torch.no_grad():
                x = torch.linspace(-1, 1, len(weight), device=weight.device, dtype=weight.dtype)
                here, there = (self.norm.forward(value[None]) for value in (x, x + 1))
            self._centres = torch.allclose(here, there, atol=0.1)
        return self._centres
