"""The layers that take a site's units, as matrices of what each unit brings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hfslim.anatomy.units import Site

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
PLACES = 256
"""Places of a convolution's output that are looked at, of each example."""


@dataclass(frozen=True)
class Projection:
    """A layer `y = W x` whose inputs are a site's units: a linear layer, or a convolution.

    Of a convolution `x` is what it sees of its input at one place of its output.

    Attributes:
        path: Module path of the layer.
        module: The layer.
        dim: The dimension of its weight along which the units lie.
        width: Inputs per unit.
    """

    path: str
    module: nn.Module
    dim: int
    width: int

    @property
    def weight(self) -> torch.Tensor:
        """The layer's `W`, `[outputs, inputs]`."""
        weight = self.module.get_parameter("weight").detach()
        return weight.flatten(1) if self.convolves else weight.movedim(self.dim, -1)

    def put(self, weight: torch.Tensor) -> None:
        """Set the layer's `W`, `[outputs, inputs]`."""
        if self.convolves:
            whole = self.module.get_parameter("weight").detach()
            whole.copy_(weight.view(whole.shape))
        else:
            self.weight.copy_(weight)

    @property
    def convolves(self) -> bool:
        """Whether it is a convolution."""
        return isinstance(self.module, CONVOLUTIONS)

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's bias, if it has one, `[outputs]`."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()

    def positions(self, x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what comes in and what is at the output, position by position.

        Of a convolution they are `PLACES` at most of each example, the same of all, drawn once;
        what is at the output then counts for those that are left out.

        Args:
            x: The layer's input.
            g: What there is at its output, of the same shape as it.

        Returns:
            `[positions, inputs]` and `[positions, outputs]`.
        """
        if not self.convolves:
            return x.flatten(0, -2), g.flatten(0, -2)
        conv: Any = self.module
        kernel, dilation, padding, stride = (
            conv.kernel_size,
            conv.dilation,
            conv.padding,
            conv.stride,
        )
        if isinstance(conv, nn.Conv1d):
            # As an image of one row.
            x, kernel, dilation = x.unsqueeze(-2), (1, *kernel), (1, *dilation)
            padding, stride = (0, *padding), (1, *stride)
        seen, given = functional.unfold(x.float(), kernel, dilation, padding, stride), g.flatten(2)
        number = given.shape[-1]
        if number > PLACES:
            places = torch.randperm(number, generator=torch.Generator().manual_seed(0))[:PLACES]
            seen, given = seen[..., places.to(x.device)], given[..., places.to(x.device)]
            given = given * math.sqrt(number / PLACES)
        return seen.transpose(1, 2).flatten(0, 1), given.transpose(1, 2).flatten(0, 1)


def projections(model: nn.Module, site: Site) -> list[Projection]:
    """Return the layers that a site's units meet.

    Raises:
        ValueError: What meets them is no matrix of theirs alone.
    """
    found = []
    for feed in site.feeds:
        one = None if site.twins else _projection(model, site, feed.module)
        if one is None:
            raise ValueError(
                f"{feed.module!r} has no weight matrix that meets the {site.kind} as its inputs: "
                f"set another criterion for {site.kind}, such as fisher"
            )
        found.append(one)
    return found


def _projection(model: nn.Module, site: Site, path: str) -> Projection | None:
    module = model.get_submodule(path)
    for cut in site.cuts:
        if (cut.module, cut.tensor) != (path, "weight"):
            continue
        weight = module.get_parameter("weight")
        if isinstance(module, CONVOLUTIONS):
            plain = module.groups == 1 and module.padding_mode == "zeros"
            if plain and isinstance(module.padding, tuple) and cut.dim == 1:
                if weight.shape[1] == site.size:
                    return Projection(path, module, 1, weight[0, 0].numel())
        elif weight.ndim == 2 and weight.shape[cut.dim] == site.size * site.width:
            return Projection(path, module, cut.dim, site.width)
    return None
