"""The entries of tensors, and of modules' inputs, that belong to the units of a site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cut:
    """One dimension of one tensor along which the units of a site lie.

    The dimension is a row of blocks, each of `units × width` entries: a fused `[q; k; v]`
    projection has three blocks, a gated FFN's fused input two. Entries around the blocks stay.

    Attributes:
        module: Path of the module that owns the tensor.
        tensor: Name of the parameter or buffer on that module.
        dim: The dimension.
        widths: Consecutive entries per unit, block by block.
        start: Entries before the first block.
    """

    module: str
    tensor: str
    dim: int
    widths: tuple[int, ...] = (1,)
    start: int = 0

    def indices(self, kept: Sequence[int], total: int, length: int) -> torch.Tensor:
        """Return the entries to keep of a dimension of `length`, for some of `total` units."""
        unit = torch.as_tensor(kept, dtype=torch.long)
        parts, start = [torch.arange(self.start)], self.start
        for width in self.widths:
            parts.append(start + (unit[:, None] * width + torch.arange(width)).flatten())
            start += total * width
        return torch.cat([*parts, torch.arange(start, length)])

    def by_unit(self, tensor: torch.Tensor, total: int) -> torch.Tensor:
        """Return the entries of each unit, `[total, entries]`."""
        sizes = [total * width for width in self.widths]
        rest = tensor.shape[self.dim] - self.start - sum(sizes)
        blocks = tensor.movedim(self.dim, 0).split([self.start, *sizes, rest])
        return torch.cat([block.reshape(total, -1) for block in blocks[1:-1]], dim=1)


@dataclass(frozen=True)
class Feed:
    """An input of a module in which the units of a site lie side by side, and are gated.

    Attributes:
        module: Path of the module.
        dim: The dimension.
        start: Entries before the first unit.
        width: Consecutive entries per unit.
        ndim: Number of dimensions of the inputs that count, where the module takes others too.
        blocks: Number of blocks, each with `width` entries of every unit.
    """

    module: str
    dim: int = -1
    start: int = 0
    width: int = 1
    ndim: int = 0
    blocks: int = 1

    @property
    def features(self) -> int:
        """Entries per unit."""
        return self.width * self.blocks

    def of(self, value: torch.Tensor, units: int) -> torch.Tensor:
        """Return the entries of all units, `[..., units · features]`."""
        part = value.movedim(self.dim, -1).narrow(-1, self.start, units * self.features)
        if self.blocks == 1:
            return part
        by_block = part.unflatten(-1, (self.blocks, units, self.width))
        return by_block.transpose(-3, -2).flatten(-3)

    def spread(self, numbers: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Spread one factor per unit, `[units]`, to a shape that broadcasts against an input."""
        numbers = numbers.to(value.device).repeat_interleave(self.width).repeat(self.blocks)
        rest = value.shape[self.dim] - self.start - len(numbers)
        whole = torch.cat([numbers.new_ones(self.start), numbers, numbers.new_ones(rest)])
        return whole.reshape(-1, *[1] * (value.ndim - 1 - self.dim % value.ndim))
