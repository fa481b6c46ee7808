"""Gates on experts and on the neurons inside them, which are the input of no module.

The router runs on its rows for the open experts only, so that choice, softmax and normalisation are
those of the cut model. If fewer experts are open than each token is routed to, it is routed to all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from hfslim.anatomy.units import Site
from hfslim.pruning.gates.masks import Masks

Hook = Callable[[nn.Module, tuple], tuple | None]
"""A forward pre-hook that gates its first argument."""
Inside = Callable[[torch.Tensor], torch.Tensor]
"""From and to the input of the second projections, `[tokens, chosen, neurons]`."""


class Handle(Protocol):
    """A change of a model that can be undone."""

    def remove(self) -> None:
        """Undo the change."""


def gate_experts(model: nn.Module, site: Site, hook: Hook, masks: Masks) -> Iterator[Handle]:
    """Attach the gates of a site of experts, or of neurons inside them; yields their handles.

    The hook gates `[tokens, chosen, neurons]`, or for experts the routing weights,
    `[tokens, experts]`. Masks are read at each forward pass.
    """
    module = model.get_submodule(site.gate)

    def gated(value: torch.Tensor) -> torch.Tensor:
        return (hook(module, (value,)) or (value,))[0]

    if site.kind == "neurons":
        yield GatedExperts(module, gated)
        return

    def gate_weights(_: nn.Module, args: tuple) -> tuple:
        hidden_states, chosen, weights = args
        spread = weights.new_zeros(len(weights), site.size).scatter_add(1, chosen, weights)
        return hidden_states, chosen, gated(spread).gather(1, chosen)

    yield GatedRouter(model.get_submodule(site.experts.router), site, masks)
    yield module.register_forward_pre_hook(gate_weights)


class GatedRouter:
    """Makes a router choose among the open experts only, until `remove` is called.

    Parameters do not change: slices replace them as attributes while the router runs.
    """

    def __init__(self, router: nn.Module, site: Site, masks: Masks) -> None:
        self.site, self.masks = site, masks
        path = site.experts.router
        inside = path[len(site.path) + 1 :] + "."
        counts, clipped = [name for name, _ in site.attributes], site.experts.clipped
        self.counts, self.clipped = (
            [name.removeprefix(inside) for name in names if name.startswith(inside)]
            for names in (counts, clipped)
        )
        self.tensors = [
            (router.get_submodule(cut.module[len(path) + 1 :]), cut.tensor)
            for cut in site.cuts
            if f"{cut.module}.".startswith(f"{path}.")
        ]
        self._stock: dict[str, Any] = {}
        self._kept: torch.Tensor | None = None
        self._handles: list[RemovableHandle] = [
            router.register_forward_pre_hook(self._narrow),
            router.register_forward_hook(self._widen, always_call=True),
        ]

    def remove(self) -> None:
        """Remove the hooks of the router."""
        for handle in self._handles:
            handle.remove()

    def _narrow(self, router: nn.Module, _: tuple) -> None:
        mask = self.masks.get((self.site.kind, self.site.path))
        if mask is None:
            return
        kept = self._kept = mask.nonzero().flatten()
        here = vars(router)
        self._stock = {name: here[name] for name in (*self.counts, *self.clipped)}
        for module, name in self.tensors:
            whole = getattr(module, name)
            vars(module)[name] = whole.index_select(0, kept.to(whole.device))
        here.update(dict.fromkeys(self.counts, len(kept)))
        here.update({name: min(here[name], len(kept)) for name in self.clipped})

    def _widen(self, router: nn.Module, _: tuple, output: Any) -> Any:
        kept, self._kept = self._kept, None
        if kept is None:
            return output
        for module, name in self.tensors:
            del vars(module)[name]
        vars(router).update(self._stock)
        if output is None:
            return None
        logits, weights, chosen = output
        return logits, weights, kept.to(chosen.device)[chosen]


class GatedExperts:
    """Replaces the forward pass of experts by one that gates neurons, until `remove` is called."""

    def __init__(self, module: nn.Module, inside: Inside) -> None:
        self.module = module
        self.before = vars(module).get("forward")

        def forward(
            hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
        ) -> torch.Tensor:
            return run_experts(module, hidden_states, chosen, weights, inside)

        vars(module)["forward"] = forward

    def remove(self) -> None:
        """Restore the module's own forward pass."""
        del vars(self.module)["forward"]
        if self.before is not None:
            vars(self.module)["forward"] = self.before


def run_experts(
    module: Any,
    hidden_states: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    inside: Inside,
) -> torch.Tensor:
    """Run the experts of a module, expert by expert, with `inside` applied to the neurons.

    Hidden states and result are `[tokens, features]`; the experts of each token and their routing
    weights `[tokens, chosen]`.
    """
    number = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=module.num_experts).tolist()
    first = "gate_up_proj" if module.has_gate else "up_proj"
    activate = module._apply_gate if module.has_gate else module.act_fn
    neurons = activate(_each(module, first, hidden_states[order // number], counts))
    back = order.argsort()
    neurons = inside(neurons[back].unflatten(0, (-1, number))).flatten(0, 1)
    result = _each(module, "down_proj", neurons[order], counts)
    if getattr(module, "has_post_expert_norm", False):
        result = module.post_expert_norm(result)
    result = result[back].unflatten(0, (-1, number)) * weights.unsqueeze(-1)
    return result.sum(1).to(hidden_states.dtype)


def _each(module: Any, name: str, values: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Apply a projection of each expert to its own rows."""
    weight, bias = getattr(module, name), getattr(module, f"{name}_bias", None)
    if module.is_transposed:
        weight = weight.transpose(1, 2)
    parts = [
        F.linear(rows, weight[expert], None if bias is None else bias[expert])
        for expert, rows in enumerate(values.split(counts))
    ]
    return torch.cat(parts)
