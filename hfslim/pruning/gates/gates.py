"""Reversible multipliers on the units of a live model.

A gate on a head or a neuron multiplies its slice of the input of the projection that follows, a
gate on a channel or a dimension its slice of the input of everything that takes it, and norms take
statistics over open dimensions; a gate on an expert takes it out of its router's choice; a gate on
a layer scales what it adds to the residual stream. Nothing is registered on the model, whose keys
stay as they are; it may be wrapped, checkpointed or trained meanwhile.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.slices import Feed
from hfslim.anatomy.structure import Kind, Structure
from hfslim.anatomy.units import Site, Units
from hfslim.hub.format import modeling_hfslim
from hfslim.pruning.gates.gate_gradients import (
    OnGradient,
    Sums,
    Tap,
    by_layer,
    by_unit,
    joined,
    states_after,
    states_before,
    with_states,
)
from hfslim.pruning.gates.gated_experts import Handle, gate_experts
from hfslim.pruning.gates.gated_norms import GatedNorm
from hfslim.pruning.gates.masks import Masks

logger = logging.getLogger(__name__)

Key = tuple[Kind, str]
OnActivation = Callable[[Site, int, torch.Tensor, torch.Tensor], None]
"""Called with a site, the index of a layer, its input and its output, `[rows, ..., features]`; for
other kinds both are what the gate multiplies."""
OnOutput = Callable[[Any], None]
"""Called with what the model returns."""


class Gates:
    """The gates of a model, one for every unit; all open until `set` closes some.

    Args:
        model: The model itself, not a wrapper around it.
        units: The sites to gate; all that `find_units` finds if not given.
        owner: Who keeps them in the model for long. What an interrupted run of the same owner left
            behind is taken out when these are attached.

    Attributes:
        on_gradient: If set, gets the gradient of the loss by the gates of every example, at each
            backward pass.
        on_activation: If set, gets what each gate multiplies, at each forward pass.
        on_output: If set, gets what the model returns, at each forward pass.
        anchors: Tensors whose gradients, when asked of autograd, make `on_gradient` fire for the
            current forward pass.
        examples: Number of examples in the current forward pass.
        padding: The attention mask of the current forward pass, `[examples, positions]`, if any.
        fired: How often the gates of each site have been reached since `attach`; of dimensions,
            those at each module.
        structure: What the gates leave open, where `set` has told.
        factors: What multiplies units besides, `[units]` by site; gradients pass to it.
    """

    def __init__(self, model: nn.Module, units: Units | None = None, owner: str = "") -> None:
        self.model = model
        self.owner = owner
        self.units = find_units(model) if units is None else units
        self.on_gradient: OnGradient | None = None
        self.on_activation: OnActivation | None = None
        self.on_output: OnOutput | None = None
        self.anchors: list[torch.Tensor] = []
        self.examples = 0
        self.padding: torch.Tensor | None = None
        self.fired: Counter[Key] = Counter()
        self.structure: Structure | None = None
        self.factors: Mapping[Key, torch.Tensor] = {}
        self._masks = Masks()
        self._closed_layers: dict[Key, frozenset[int]] = {}
        self._sums = Sums()
        self._entered: dict[tuple[Key, int], list[torch.Tensor]] = {}
        self._turns: Counter[str] = Counter()
        self._handles: list[Handle] = []
        self._stock: list[tuple[nn.Module, type]] = []

    def set(self, structure: Structure) -> None:
        """Close the gates of the units that a structure removes, and open all others."""
        structure = self.structure = self.units.complete(structure)
        self._masks.clear()
        self._closed_layers.clear()
        for site in self.units:
            kept = structure.kept(site.kind, site.path)
            if len(kept) == site.size:
                continue
            if site.kind == "layers":
                self.close_layers(site, frozenset(range(site.size)) - frozenset(kept))
            else:
                self._masks.close(site, kept)

    def close_layers(self, site: Site, closed: frozenset[int]) -> None:
        """Let the residual stream pass by some layers of a list, until told otherwise."""
        self._closed_layers["layers", site.path] = closed

    def attach(self) -> Gates:
        """Put the gates into the model."""
        if self._handles:
            raise RuntimeError("these gates are attached already")
        self._take_over()
        self.fired.clear()
        count = self.model.register_forward_pre_hook(self._count_examples, with_kwargs=True)
        self._handles += [count, self.model.register_forward_hook(self._show_output)]
        for site in self.units:
            module = self.model.get_submodule(site.path)
            if site.heads.replacement and type(module) is modeling_hfslim.stock_class(module):
                self._stock.append((module, type(module)))
                modeling_hfslim.replace_class(module, site.heads.replacement)
            if site.layers.runs:
                self._attach_runs(site)
            elif site.kind == "layers":
                for index in range(site.size):
                    self._attach_layer(site, index)
            for feed in site.feeds:
                module = self.model.get_submodule(feed.module)
                hook = self._unit_hook(site, feed)
                if site.experts.inside:
                    self._handles += gate_experts(self.model, site, hook, self._masks)
                else:
                    self._handles.append(module.register_forward_pre_hook(hook))
            for feed in site.masked_norms:
                norm = GatedNorm(self.model.get_submodule(feed.module))
                self._handles += norm.attach(functools.partial(self._norm_mask, site, feed))
        return self

    def _attach_layer(self, site: Site, index: int) -> None:
        first, last = (self.model.get_submodule(path) for path in site.seen(index))
        hook = self._layer_hook(site, index)
        self._handles.append(last.register_forward_hook(hook, with_kwargs=True))
        if first is not last:

            def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                states = states_before(site, module, args, kwargs)
                self._entered[("layers", site.path), index] = states

            self._handles.append(first.register_forward_pre_hook(enter, with_kwargs=True))

    def _attach_runs(self, site: Site) -> None:
        hooks = [self._layer_hook(site, index) for index in range(site.size)]

        def in_turn(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            turn = self._turns[site.path]
            self._turns[site.path] += 1
            return hooks[turn % site.size](module, args, kwargs, output)

        only = self.model.get_submodule(f"{site.path}.0")
        self._handles.append(only.register_forward_hook(in_turn, with_kwargs=True))

    def detach(self) -> None:
        """Take the gates out again; the model is as it was before."""
        for handle in self._handles:
            handle.remove()
        for module, stock in self._stock:
            module.__class__ = stock
        self._handles.clear()
        self._stock.clear()
        self.anchors.clear()

    def __enter__(self) -> Gates:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def check_fired(self) -> None:
        """Check that one forward pass, run since `attach`, has reached every gate once.

        Raises:
            RuntimeError: A gate was not reached, so closing it would have no effect; or more than
                once, so that its uses cannot be told apart.
        """
        silent = [p for s in self.units for p in s.gated_at if not self.fired[s.kind, p]]
        if silent:
            raise RuntimeError(
                f"{type(self.model).__name__} does not run {silent[:3]} as modules, so their units "
                "can be neither scored nor removed; leave their kind out of `units`"
            )
        for site in (one for one in self.units if one.kind != "dimensions"):
            uses = self.fired[site.kind, site.path] / (len(site.feeds) or site.size)
            if uses != site.uses:
                raise RuntimeError(
                    f"{type(self.model).__name__} runs {site.path!r} {uses:g} times in one forward "
                    f"pass, where {site.uses} was expected, so that its units cannot be scored: "
                    f"leave {site.kind} out of `units`"
                )

    def _take_over(self) -> None:
        """Take out the gates that an interrupted run of the same owner left in the model."""
        left = attached(self.model, self.owner) if self.owner else None
        while left is not None:
            logger.warning("taking out the gates that an interrupted %s left", self.owner)
            left.detach()
            left = attached(self.model, self.owner)

    def _count_examples(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim)
        self.examples = next(tensors).shape[0]
        self._sums = Sums()
        self._entered.clear()
        self._turns.clear()
        self.padding = kwargs.get("attention_mask")
        self.anchors.clear()

    def _show_output(self, _: nn.Module, __: tuple, output: Any) -> None:
        if self.on_output is not None:
            self.on_output(output)

    def _anchor(self, value: torch.Tensor) -> torch.Tensor:
        """Make the graph reach a tap even where no parameter before it needs a gradient."""
        self.anchors.append(torch.zeros((), device=value.device, requires_grad=True))
        return self.anchors[-1]

    def _unit_hook(self, site: Site, feed: Feed) -> Callable[[nn.Module, tuple], tuple | None]:
        key = (site.kind, site.path)
        place = (site.kind, feed.module) if site.kind == "dimensions" else key

        def hook(_: nn.Module, args: tuple) -> tuple | None:
            value, *rest = args
            if feed.ndim and value.ndim != feed.ndim:
                return None
            self.fired[place] += 1
            # Relative positions are no example's own, and score nothing.
            owned = site.kind != "dimensions" or value.shape[0] % max(self.examples, 1) == 0
            if self.on_activation is not None and owned:
                part = feed.of(value.detach(), site.size).movedim(site.batch, 0)
                self.on_activation(site, 0, part, part)
            if self.on_gradient is not None and torch.is_grad_enabled() and owned:
                examples, send = self.examples, self._sums.of(site, self.on_gradient)
                value = Tap.apply(
                    value,
                    None,
                    self._anchor(value),
                    lambda grad, x: send(site, 0, by_unit(grad * x, examples, site, feed)),
                )
            value = self._masks.apply(site, feed, value)
            if key in self.factors:
                value = (value * feed.spread(self.factors[key], value)).to(value.dtype)
            return (value, *rest)

        return hook

    def _norm_mask(self, site: Site, norm: Feed, value: torch.Tensor) -> torch.Tensor | None:
        self.fired[site.kind, norm.module] += 1
        return self._masks.at(site, norm, value)

    def _layer_hook(self, site: Site, index: int) -> Callable[..., Any]:
        key = (site.kind, site.path)

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            self.fired[key] += 1
            before = self._entered.pop((key, index), None)
            if before is None:
                before = states_before(site, module, args, kwargs)
            after = states_after(output, len(before))
            if any(b.shape != a.shape for b, a in zip(before, after, strict=True)):
                # It cannot go: it is no addition to its input, and has nothing to be scored by.
                return output
            if self.on_activation is not None:
                whole = (joined(states).detach() for states in (before, after))
                self.on_activation(site, index, *(x.movedim(site.batch, 0) for x in whole))
            pairs = zip(before, after, strict=True)
            after = [self._gated_state(site, index, b, a) for b, a in pairs]
            return with_states(output, after)

        return hook

    def _gated_state(
        self, site: Site, index: int, before: torch.Tensor, after: torch.Tensor
    ) -> torch.Tensor:
        key = (site.kind, site.path)
        if self.on_gradient is not None and torch.is_grad_enabled():
            examples, send = self.examples, self._sums.of(site, self.on_gradient)
            after = Tap.apply(
                after,
                before,
                self._anchor(after),
                lambda grad, x: send(
                    site, index, by_layer((grad * x).movedim(site.batch, 0), examples)
                ),
            )
            if site.layers.beside:
                # XLM multiplies what its lists give by the mask, in place.
                after = after.clone()
        if index in self._closed_layers.get(key, ()):
            # The layer stays in the graph, so that every parameter gets a gradient under DDP.
            after = before + 0 * after if torch.is_grad_enabled() else before
        if key in self.factors:
            after = torch.lerp(before, after, self.factors[key][index].to(after))
        return after


def attached(model: nn.Module, owner: str) -> Gates | None:
    """Return the gates that an owner keeps in a model, if there are any."""
    for hook in model._forward_pre_hooks.values():
        gates = getattr(hook, "__self__", None)
        if isinstance(gates, Gates) and gates.owner == owner:
            return gates
    return None


def closed_layers(model: nn.Module) -> set[nn.Module]:
    """Return the layers that gates in a model close at this moment."""
    hooks = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    closed = {
        gates.units.site("layers", path).seen(index)[1]
        for gates in hooks
        if isinstance(gates, Gates)
        for (_, path), indices in gates._closed_layers.items()
        for index in indices
        if not gates.units.site("layers", path).layers.runs
    }
    return {model.get_submodule(path) for path in closed}


@contextmanager
def gated(model: nn.Module, structure: Structure) -> Iterator[Gates]:
    """Run a model as if a structure's removed units were gone; the model is not changed.

    Args:
        model: The model itself, not a wrapper around it.
        structure: The units to keep. Sites that it leaves out keep all.

    Yields:
        The gates.

    Raises:
        KeyError: The structure names a site that the model does not have.
        ValueError: It counts other numbers of units, or removes one that cannot go.
    """
    gates = Gates(model, find_units(model, structure.has("dimensions")))
    gates.set(structure)
    with gates:
        yield gates
