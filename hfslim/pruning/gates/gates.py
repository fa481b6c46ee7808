"""Reversible multipliers on the units of a live model.

A gate on a head or a neuron multiplies its slice of the input of the projection that follows; a
gate on a channel or a dimension multiplies its slice of the input of every module that takes it,
and norms compute their statistics over open dimensions; a gate on an expert excludes it from its
router's choice; a gate on a layer scales what the layer adds to the residual stream. Gates are
hooks: `state_dict` keys do not change, and the model can be wrapped, checkpointed or trained.
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
from hfslim.anatomy.structure import Key, Structure
from hfslim.anatomy.units import Site, Units
from hfslim.hub.format import modeling_hfslim
from hfslim.pruning.gates.gate_gradients import GradientProbe, GradientSums, OnGradient, by_unit
from hfslim.pruning.gates.gated_experts import Handle, gate_experts
from hfslim.pruning.gates.gated_norms import GatedNorm
from hfslim.pruning.gates.layer_gates import LayerGates
from hfslim.pruning.gates.masks import Masks

logger = logging.getLogger(__name__)

OnActivation = Callable[[Site, int, torch.Tensor, torch.Tensor], None]
"""Called with a site, the index of a layer, its input and its output, `[rows, ..., features]`; for
other kinds both are the values that the gate multiplies."""
OnOutput = Callable[[Any], None]
"""Called with the output of the model."""


class Gates:
    """The gates of a model, one for every unit; all open until `set` closes some.

    Args:
        model: The model itself, not a wrapper around it.
        units: The sites to gate; all that `find_units` finds if not given.
        owner: Name of a callback that keeps the gates attached. `attach` removes gates that an
            interrupted run of the same owner left in the model.

    Attributes:
        on_gradient: Called with the gradient of the loss by the gates, per example, at each
            backward pass.
        on_activation: Called with the values that each gate multiplies, at each forward pass.
        on_output: Called with the output of the model, at each forward pass.
        anchors: Leaves of the graph of the current forward pass: `torch.autograd.grad` by them
            calls `on_gradient`.
        sums: The gradients of the current forward pass, summed over the inputs of each gate.
        examples: Number of examples in the current forward pass.
        padding: The attention mask of the current forward pass, `[examples, positions]`, if any.
        fired: Number of calls of the gates of each site since `attach`; for dimensions by module.
        structure: The structure that `set` was called with.
        closed: Indices of the closed layers, by list.
        factors: Further multipliers of units, `[units]` by site; gradients pass to them.
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
        self.closed: dict[Key, frozenset[int]] = {}
        self.factors: Mapping[Key, torch.Tensor] = {}
        self.sums = GradientSums()
        self._masks = Masks()
        self._layers = {s.path: LayerGates(self, s) for s in self.units if s.kind == "layers"}
        self._handles: list[Handle] = []
        self._stock: list[tuple[nn.Module, type]] = []

    def set(self, structure: Structure) -> None:
        """Close the gates of the units that a structure removes, and open all others."""
        structure = self.structure = self.units.complete(structure)
        self._masks.clear()
        self.closed.clear()
        for site in self.units:
            kept = structure.kept(site.kind, site.path)
            if len(kept) == site.size:
                continue
            if site.kind == "layers":
                self.close_layers(site, frozenset(range(site.size)) - frozenset(kept))
            else:
                self._masks.close(site, kept)

    def close_layers(self, site: Site, closed: frozenset[int]) -> None:
        """Skip some layers of a list, so that the residual stream bypasses them; run all others."""
        self.closed["layers", site.path] = closed

    def attach(self) -> Gates:
        """Register the gates' hooks on the model."""
        if self._handles:
            raise RuntimeError("these gates are attached already")
        self._detach_leftovers()
        self.fired.clear()
        start = self.model.register_forward_pre_hook(self._start_forward, with_kwargs=True)
        self._handles += [start, self.model.register_forward_hook(self._end_forward)]
        for site in self.units:
            module = self.model.get_submodule(site.path)
            if site.heads.replacement and type(module) is modeling_hfslim.stock_class(module):
                self._stock.append((module, type(module)))
                modeling_hfslim.replace_class(module, site.heads.replacement)
            if site.kind == "layers":
                self._handles += self._layers[site.path].attach()
            for feed in site.feeds:
                hook = self._unit_hook(site, feed)
                if site.experts.inside:
                    self._handles += gate_experts(self.model, site, hook, self._masks)
                else:
                    module = self.model.get_submodule(feed.module)
                    self._handles.append(module.register_forward_pre_hook(hook))
            for feed in site.masked_norms:
                norm = GatedNorm(self.model.get_submodule(feed.module))
                self._handles += norm.attach(functools.partial(self._norm_mask, site, feed))
        return self

    def detach(self) -> None:
        """Remove the gates; the model is then as before."""
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
        """Raise a RuntimeError unless one forward pass since `attach` has called every gate once.

        Closing a gate that is not called has no effect; units whose gate is called more often than
        expected cannot be scored.
        """
        silent = [p for s in self.units for p in s.gated_at if not self.fired[s.kind, p]]
        if silent:
            raise RuntimeError(
                f"{type(self.model).__name__} does not run {silent[:3]} as modules, so their units "
                "can be neither scored nor removed; leave their kind out of `units`"
            )
        for site in (one for one in self.units if one.kind != "dimensions"):
            uses = self.fired[site.key] / (len(site.feeds) or site.size)
            if uses != site.uses:
                raise RuntimeError(
                    f"{type(self.model).__name__} runs {site.path!r} {uses:g} times in one forward "
                    f"pass, where {site.uses} was expected, so that its units cannot be scored: "
                    f"leave {site.kind} out of `units`"
                )

    def anchor(self, value: torch.Tensor) -> torch.Tensor:
        """Return a leaf through which gradients reach a probe, even if no parameter needs one."""
        self.anchors.append(torch.zeros((), device=value.device, requires_grad=True))
        return self.anchors[-1]

    def _detach_leftovers(self) -> None:
        """Detach the gates that an interrupted run of the same owner left in the model."""
        left = attached_gates(self.model, self.owner) if self.owner else None
        while left is not None:
            logger.warning("removing the gates that an interrupted %s left", self.owner)
            left.detach()
            left = attached_gates(self.model, self.owner)

    def _start_forward(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim)
        self.examples = next(tensors).shape[0]
        self.sums = GradientSums()
        for layers in self._layers.values():
            layers.reset()
        self.padding = kwargs.get("attention_mask")
        self.anchors.clear()

    def _end_forward(self, _: nn.Module, __: tuple, output: Any) -> None:
        if self.on_output is not None:
            self.on_output(output)

    def _unit_hook(self, site: Site, feed: Feed) -> Callable[[nn.Module, tuple], tuple | None]:
        key = site.key
        place = (site.kind, feed.module) if site.kind == "dimensions" else key

        def hook(_: nn.Module, args: tuple) -> tuple | None:
            value, *rest = args
            if feed.ndim and value.ndim != feed.ndim:
                return None
            self.fired[place] += 1
            # Relative positions belong to no example, and do not count.
            owned = site.kind != "dimensions" or value.shape[0] % max(self.examples, 1) == 0
            if self.on_activation is not None and owned:
                part = feed.of(value.detach(), site.size).movedim(site.batch, 0)
                self.on_activation(site, 0, part, part)
            if self.on_gradient is not None and torch.is_grad_enabled() and owned:
                examples, send = self.examples, self.sums.of(site, self.on_gradient)
                value = GradientProbe.apply(
                    value,
                    None,
                    self.anchor(value),
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


def attached_gates(model: nn.Module, owner: str) -> Gates | None:
    """Return the gates of an owner that are attached to a model, if there are any."""
    for hook in model._forward_pre_hooks.values():
        gates = getattr(hook, "__self__", None)
        if isinstance(gates, Gates) and gates.owner == owner:
            return gates
    return None


def closed_layers(model: nn.Module) -> set[nn.Module]:
    """Return the layers of a model that gates close now."""
    hooks = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    closed = {
        gates.units.site("layers", path).seen(index)[1]
        for gates in hooks
        if isinstance(gates, Gates)
        for (_, path), indices in gates.closed.items()
        for index in indices
        if not gates.units.site("layers", path).layers.runs
    }
    return {model.get_submodule(path) for path in closed}


@contextmanager
def gated(model: nn.Module, structure: Structure) -> Iterator[Gates]:
    """Run a model inside the block as if it had a structure; its weights do not change.

    Args:
        model: The model itself, not a wrapper around it.
        structure: The units to keep. Sites that are not in it keep all units.

    Yields:
        The gates.

    Raises:
        KeyError: The structure names a site that the model does not have.
        ValueError: It counts other numbers of units, or removes one that cannot be removed.
    """
    gates = Gates(model, find_units(model, structure.has("dimensions")))
    gates.set(structure)
    with gates:
        yield gates
