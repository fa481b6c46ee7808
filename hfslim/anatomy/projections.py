"""Linear maps, whatever their class: sizes, and the tensors along inputs and outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfslim.anatomy.slices import Cut, Feed


@dataclass(frozen=True)
class Projection:
    """One linear map inside a model, or a convolution over single positions.

    Attributes:
        path: Path of the module.
        inputs: Number of input features.
        outputs: Number of output features.
        along_outputs: Tensors with an entry per output, and the dimension.
        along_inputs: Tensors with an entry per input, and the dimension.
        groups: Groups of the convolution; 0 for linear maps.
    """

    path: str
    inputs: int
    outputs: int
    along_outputs: tuple[tuple[str, int], ...]
    along_inputs: tuple[tuple[str, int], ...]
    groups: int = 0

    @classmethod
    def at(cls, path: str, module: nn.Module | None) -> Projection | None:
        """Return the projection that a module is, if it is one."""
        weight = getattr(module, "weight", None)
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            return cls(path, inputs, outputs, (("weight", 1), ("bias", 0)), (("weight", 0),))
        if isinstance(module, nn.Conv1d) and (*module.kernel_size, *module.stride) == (1, 1):
            outputs, inputs = module.out_channels, module.in_channels
            along = tuple((name, 0) for name, _ in module.named_parameters(recurse=False))
            return cls(path, inputs, outputs, along, (("weight", 1),), module.groups)
        if module is None or weight is None or weight.ndim != 2:
            return None
        # Quantised look-alikes share these names; embeddings and norms do not.
        if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
            return None
        outputs, inputs = weight.shape
        tensors = own_tensors(module)
        rows = tuple((n, 0) for n, t in tensors.items() if t.ndim and t.shape[0] == outputs)
        columns = tuple((n, 1) for n, t in tensors.items() if t.shape == weight.shape)
        return cls(path, inputs, outputs, rows, columns)

    def rows(self, *widths: int) -> list[Cut]:
        """Return the cuts of the outputs, with one width per block."""
        return [Cut(self.path, name, dim, widths) for name, dim in self.along_outputs]

    def columns(self, *widths: int) -> list[Cut]:
        """Return the cuts of the inputs, with one width per block."""
        return [Cut(self.path, name, dim, widths) for name, dim in self.along_inputs]


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a module itself, by name."""
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


def find_projection(
    modules: Mapping[str, nn.Module], path: str, names: Iterable[str]
) -> Projection | None:
    """Return the first of some names below a path, or beside it with `^`, that is a projection."""
    for name in names:
        base, name = (path.rpartition(".")[0], name[1:]) if name[0] == "^" else (path, name)
        full = f"{base}.{name}" if base else name
        found = Projection.at(full, modules.get(full))
        if found is not None:
            return found
    return None


def groups_of(projections: Sequence[Projection]) -> int:
    """Return the number of blocks of channels that lose the same units; 0 without convolutions."""
    convolved = any(one.groups for one in projections)
    return math.lcm(*(one.groups or 1 for one in projections)) if convolved else 0


def cuts_of(
    makers: Sequence[Projection], taker: Projection, blocks: int, width: int
) -> tuple[Cut, ...]:
    """Return the cuts of units with `width` channels in each of some blocks.

    Args:
        makers: The convolutions whose outputs hold the units.
        taker: The convolution that takes them; its weight has the inputs of a single group.
        blocks: Number of blocks of channels.
        width: Channels of a unit in each block.
    """
    inside = blocks // max(taker.groups, 1)
    return (
        *(cut for one in makers for cut in one.rows(*[width] * blocks)),
        *taker.columns(*[width] * inside),
    )


def feed_of(taker: Projection, blocks: int, width: int) -> Feed:
    """Return the input `[examples, channels, positions]` that carries the units."""
    return Feed(taker.path, dim=1, width=width, blocks=blocks)
