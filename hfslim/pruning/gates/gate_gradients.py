"""Gradients of the loss by gates, from gradients beside their values in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hfslim.anatomy.slices import Feed
from hfslim.anatomy.structure import Kind
from hfslim.anatomy.units import Site

OnGradient = Callable[[Site, int, torch.Tensor], None]
"""Called with a site, the index of a layer (0 for other kinds) and `[examples, units]`."""


class GradientProbe(torch.autograd.Function):
    """The identity; its backward pass reports the gradient together with the value.

    `∂L/∂ξ` of a gate ξ that multiplies a slice `x` is the sum of `x · ∂L/∂x` over the slice, so no
    gate tensor is needed, and the forward pass costs nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: torch.Tensor,
        base: torch.Tensor | None,
        anchor: torch.Tensor,
        report: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> torch.Tensor:
        """Return the value unchanged."""
        ctx.report, ctx.has_base = report, base is not None
        ctx.save_for_backward(value, *([] if base is None else [base]))
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        """Report the gradient and the value, less its base if there is one; pass the gradient."""
        value, *base = ctx.saved_tensors
        ctx.report(grad, value - base[0] if base else value)
        return grad, None, None, None


class GradientSums:
    """Sums the gradients of all inputs that one gate multiplies in one pass through the model."""

    def __init__(self) -> None:
        self._found: dict[tuple[Kind, str, int], list[torch.Tensor]] = {}

    def of(self, site: Site, send: OnGradient) -> OnGradient:
        """Return a function that takes the gradients one by one and sends their sum."""
        uses = site.uses * max(len(site.feeds), len(site.layers.streams), 1)
        if uses == 1 and site.kind != "dimensions":
            return send
        # The number of parts is known in advance, except for dimensions, which some modules take
        # several times.
        counted = site.kind != "dimensions"
        two_streams = bool(site.layers.streams) or (site.kind == "heads" and len(site.feeds) > 1)

        def collect(site: Site, index: int, gradient: torch.Tensor) -> None:
            key = site.kind, site.path, index
            parts = self._found.setdefault(key, [])
            parts.append(gradient)

            def finish() -> None:
                if self._found.get(key) is parts:
                    send(site, index, torch.stack(self._found.pop(key)).sum(0))

            if counted and len(parts) == uses:
                finish()
            elif two_streams or not counted:
                # The second stream of the last layer may end there, without a gradient.
                torch.autograd.Variable._execution_engine.queue_callback(finish)

        return collect


def by_unit(product: torch.Tensor, examples: int, site: Site, feed: Feed) -> torch.Tensor:
    """Sum a product over the features of an input, to `[examples, units]`."""
    product = product.movedim(site.batch, 0)
    if product.shape[0] % examples:
        raise RuntimeError(
            f"{feed.module} gets {product.shape[0]} rows for {examples} examples, so their "
            "gradients cannot be told apart"
        )
    product = feed.of(product, site.size).reshape(examples, -1, site.size, feed.features)
    return product.sum((1, 3), dtype=torch.float32)


def by_layer(product: torch.Tensor, examples: int) -> torch.Tensor:
    """Sum a product over a layer's output, to `[examples, 1]`."""
    return product.reshape(examples, -1).sum(1, keepdim=True, dtype=torch.float32)
