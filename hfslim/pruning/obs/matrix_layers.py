"""The linear layers and convolutions whose inputs are a site's units, as matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hfslim.anatomy.units import Site

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
SAMPLED_POSITIONS = 256
"""Maximum number of output positions of a convolution that are used per example."""


@dataclass(frozen=True)
class MatrixLayer:
    """A layer `y = W x` whose inputs are a site's units: a linear layer or a convolution.

    For a convolution `x` is the patch of the input under the kernel at one output position.

    Its units lie along `dim` of the module's weight, each of `width` inputs.
    """

    path: str
    module: nn.Module
    dim: int
    width: int

    @property
    def weight(self) -> torch.Tensor:
        """The layer's `W`, `[outputs, inputs]`."""
        weight = self.module.get_parameter("weight").detach()
        return weight.flatten(1) if self.is_convolution else weight.movedim(self.dim, -1)

    def put(self, weight: torch.Tensor) -> None:
        """Set the layer's `W`, `[outputs, inputs]`."""
        if self.is_convolution:
            whole = self.module.get_parameter("weight").detach()
            whole.copy_(weight.view(whole.shape))
        else:
            self.weight.copy_(weight)

    @property
    def is_convolution(self) -> bool:
        """Whether the layer is a convolution."""
        return isinstance(self.module, CONVOLUTIONS)

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's bias, `[outputs]`; None if it has none."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()

    def positions(self, x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs `[positions, inputs]` and output gradients `[positions, outputs]`.

        For a convolution these are at most `SAMPLED_POSITIONS` of each example, the same ones in
        all examples; the gradients are scaled by the square root of the positions per sample.
        """
        if not self.is_convolution:
            return x.flatten(0, -2), g.flatten(0, -2)
        conv: Any = self.module
        kernel, dilation, padding, stride = (
            conv.kernel_size,
            conv.dilation,
            conv.padding,
            conv.stride,
        )
        if isinstance(conv, nn.Conv1d):
            # Treat it as an image of one row.
            x, kernel, dilation = x.unsqueeze(-2), (1, *kernel), (1, *dilation)
            padding, stride = (0, *padding), (1, *stride)
        patches, g = functional.unfold(x.float(), kernel, dilation, padding, stride), g.flatten(2)
        number = g.shape[-1]
        if number > SAMPLED_POSITIONS:
            order = torch.randperm(number, generator=torch.Generator().manual_seed(0))
            sample = order[:SAMPLED_POSITIONS].to(x.device)
            patches = patches[..., sample]
            g = g[..., sample] * math.sqrt(number / SAMPLED_POSITIONS)
        return patches.transpose(1, 2).flatten(0, 1), g.transpose(1, 2).flatten(0, 1)


def matrix_layers(model: nn.Module, site: Site) -> list[MatrixLayer]:
    """Return the layers whose inputs are a site's units; raise a ValueError if one is no matrix."""
    found = []
    for feed in site.feeds:
        one = None if site.twins else _matrix_layer(model, site, feed.module)
        if one is None:
            raise ValueError(
                f"{feed.module!r} has no weight matrix with the {site.kind} as its inputs: "
                f"set another criterion for {site.kind}, such as fisher"
            )
        found.append(one)
    return found


def _matrix_layer(model: nn.Module, site: Site, path: str) -> MatrixLayer | None:
    module = model.get_submodule(path)
    for cut in site.cuts:
        if (cut.module, cut.tensor) != (path, "weight"):
            continue
        weight = module.get_parameter("weight")
        if isinstance(module, CONVOLUTIONS):
            plain = module.groups == 1 and module.padding_mode == "zeros"
            if plain and isinstance(module.padding, tuple) and cut.dim == 1:
                if weight.shape[1] == site.size:
                    return MatrixLayer(path, module, 1, weight[0, 0].numel())
        elif weight.ndim == 2 and weight.shape[cut.dim] == site.size * site.width:
            return MatrixLayer(path, module, cut.dim, site.width)
    return None
