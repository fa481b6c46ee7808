"""Gates on layers: they scale what a layer adds to the residual stream, or skip the layer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hfslim.anatomy.units import Site
from hfslim.pruning.gates.gate_gradients import GradientProbe, by_layer

if TYPE_CHECKING:
    from hfslim.pruning.gates.gates import Gates


class LayerGates:
    """The gates of one list of layers.

    Args:
        gates: All gates of the model.
        site: The list of layers.
    """

    def __init__(self, gates: Gates, site: Site) -> None:
        self.gates, self.site = gates, site
        self.reset()

    def reset(self) -> None:
        """Prepare for the next forward pass."""
        self._inputs: dict[int, list[torch.Tensor]] = {}
        self._runs = 0

    def attach(self) -> Iterator[RemovableHandle]:
        """Register the hooks; yields their handles."""
        if self.site.layers.runs:
            only = self.gates.model.get_submodule(f"{self.site.path}.0")
            yield only.register_forward_hook(self._on_run, with_kwargs=True)
            return
        for index in range(self.site.size):
            first, last = (self.gates.model.get_submodule(p) for p in self.site.seen(index))

            def enter(module: nn.Module, args: tuple, kwargs: Any, index: int = index) -> None:
                self._inputs[index] = input_states(self.site, module, args, kwargs)

            def leave(
                module: nn.Module, args: tuple, kwargs: Any, output: Any, index: int = index
            ) -> Any:
                return self._gated(index, module, args, kwargs, output)

            yield last.register_forward_hook(leave, with_kwargs=True)
            if first is not last:
                yield first.register_forward_pre_hook(enter, with_kwargs=True)

    def _on_run(self, module: nn.Module, args: tuple, kwargs: Any, output: Any) -> Any:
        index = self._runs % self.site.size
        self._runs += 1
        return self._gated(index, module, args, kwargs, output)

    def _gated(
        self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> Any:
        gates, site = self.gates, self.site
        gates.fired[site.key] += 1
        before = self._inputs.pop(index, None)
        if before is None:
            before = input_states(site, module, args, kwargs)
        after = output_states(output, len(before))
        if any(b.shape != a.shape for b, a in zip(before, after, strict=True)):
            # Such a layer does not add to its input, so it can be neither removed nor scored.
            return output
        if gates.on_activation is not None:
            whole = (joined(states).detach() for states in (before, after))
            gates.on_activation(site, index, *(x.movedim(site.batch, 0) for x in whole))
        pairs = zip(before, after, strict=True)
        return with_states(output, [self._gated_state(index, b, a) for b, a in pairs])

    def _gated_state(self, index: int, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        gates, site, key = self.gates, self.site, (self.site.kind, self.site.path)
        if gates.on_gradient is not None and torch.is_grad_enabled():
            examples, send = gates.examples, gates.sums.of(site, gates.on_gradient)
            after = GradientProbe.apply(
                after,
                before,
                gates.anchor(after),
                lambda grad, x: send(
                    site, index, by_layer((grad * x).movedim(site.batch, 0), examples)
                ),
            )
            if site.layers.beside:
                # XLM multiplies the output of its lists by the mask, in place.
                after = after.clone()
        if index in gates.closed.get(key, ()):
            # The layer stays in the graph, so that every parameter gets a gradient under DDP.
            after = before + 0 * after if torch.is_grad_enabled() else before
        if key in gates.factors:
            after = torch.lerp(before, after, gates.factors[key][index].to(after))
        return after


def input_states(
    site: Site, module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    """Return the hidden states that a layer adds to: its first argument, or its named streams."""
    if site.layers.streams:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        return [given[name] for name in site.layers.streams if given.get(name) is not None]
    return [args[0] if args else kwargs["hidden_states"]]


def output_states(output: Any, streams: int) -> list[torch.Tensor]:
    """Return the hidden states in a layer's output: its first tensors."""
    if isinstance(output, torch.Tensor):
        return [output]
    return list(output.values() if type(output) is dict else output)[:streams]


def with_states(output: Any, states: list[torch.Tensor]) -> Any:
    """Return a layer's output with other hidden states."""
    if isinstance(output, torch.Tensor):
        return states[0]
    if type(output) is dict:
        return output | dict(zip(output, states, strict=False))
    return type(output)([*states, *output[len(states) :]])


def joined(states: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate streams along features, or along positions if these differ in number."""
    along = -1 if len({state.shape[1] for state in states}) == 1 else 1
    return torch.cat(states, along)
