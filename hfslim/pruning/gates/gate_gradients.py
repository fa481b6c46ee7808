"""What gates take from a forward pass: states, and gradients beside their values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hfslim.anatomy.slices import Feed
from hfslim.anatomy.structure import Kind
from hfslim.anatomy.units import Site

OnGradient = Callable[[Site, int, torch.Tensor], None]
"""Called with a site, the index of a layer (0 for other kinds) and `[examples, units]`."""


class Tap(torch.autograd.Function):
    """Pass a tensor through; on the way back, show its gradient beside its value.

    `∂L/∂ξ` of a gate ξ that multiplies a slice `x` is the sum of `x · ∂L/∂x` over the slice, so no
    gate tensor is needed, and the forward pass costs nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: torch.Tensor,
        base: torch.Tensor | None,
        anchor: torch.Tensor,
        show: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> torch.Tensor:
        """Return the value as it is."""
        ctx.show, ctx.has_base = show, base is not None
        ctx.save_for_backward(value, *([] if base is None else [base]))
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        """Show the gradient and the value, or how far it is from its base, and pass it on."""
        value, *base = ctx.saved_tensors
        ctx.show(grad, value - base[0] if base else value)
        return grad, None, None, None


class Sums:
    """Adds up the gradients of all that one gate multiplies, in one pass through the model."""

    def __init__(self) -> None:
        self._found: dict[tuple[Kind, str, int], list[torch.Tensor]] = {}

    def of(self, site: Site, send: OnGradient) -> OnGradient:
        """Return what takes one gradient after the other, and sends their sum."""
        uses = site.uses * max(len(site.feeds), len(site.layers.streams), 1)
        if uses == 1 and site.kind != "dimensions":
            return send
        # How many parts there are is known in advance, but for dimensions, which some modules take
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
                # The last layer's second stream may end there, without a gradient.
                torch.autograd.Variable._execution_engine.queue_callback(finish)

        return collect


def states_before(
    site: Site, module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    """Return what a layer adds to: its first argument, or the streams that it is known by."""
    if site.layers.streams:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        return [given[name] for name in site.layers.streams if given.get(name) is not None]
    return [args[0] if args else kwargs["hidden_states"]]


def states_after(output: Any, streams: int) -> list[torch.Tensor]:
    """Return the first tensors of what a layer returns."""
    if isinstance(output, torch.Tensor):
        return [output]
    return list(output.values() if type(output) is dict else output)[:streams]


def with_states(output: Any, states: list[torch.Tensor]) -> Any:
    """Put states in the place of the first tensors of what a layer returns."""
    if isinstance(output, torch.Tensor):
        return states[0]
    if type(output) is dict:
        return output | dict(zip(output, states, strict=False))
    return type(output)([*states, *output[len(states) :]])


def joined(states: list[torch.Tensor]) -> torch.Tensor:
    """Join the streams of a layer: along features, or positions if those of each are its own."""
    along = -1 if len({state.shape[1] for state in states}) == 1 else 1
    return torch.cat(states, along)


def by_unit(product: torch.Tensor, examples: int, site: Site, feed: Feed) -> torch.Tensor:
    """Sum what is along an input to `[examples, units]`.

    Raises:
        RuntimeError: The rows are not so many for each example.
    """
    product = product.movedim(site.batch, 0)
    if product.shape[0] % examples:
        raise RuntimeError(
            f"{feed.module} gets {product.shape[0]} rows for {examples} examples, so their "
            "gradients cannot be told apart"
        )
    product = feed.of(product, site.size).reshape(examples, -1, site.size, feed.features)
    return product.sum((1, 3), dtype=torch.float32)


def by_layer(product: torch.Tensor, examples: int) -> torch.Tensor:
    """Sum what is along a layer's output to `[examples, 1]`."""
    return product.reshape(examples, -1).sum(1, keepdim=True, dtype=torch.float32)
