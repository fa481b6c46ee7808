"""Gates on experts and on the neurons inside them, which are the input of no module.

A closed expert is one that its router does not know: the router runs on the rows of the experts
that are left, so that choice, softmax and normalisation are those of the cut model. Where fewer
are left than each token goes to, it goes to all of them.
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
"""Takes and returns what goes into the second projections, `[tokens, chosen, neurons]`."""


class Handle(Protocol):
    """Takes something out of a model again."""

    def remove(self) -> None:
        """Take it out."""


def gate_experts(model: nn.Module, site: Site, hook: Hook, masks: Masks) -> Iterator[Handle]:
    """Put the gates of a site of experts, or of neurons inside them, into a model.

    Args:
        model: The model.
        site: The site.
        hook: The gate: of neurons it gets `[tokens, chosen, neurons]`, of experts the weights that
            tokens give them, `[tokens, experts]`.
        masks: Which units are open; looked at when the model runs.

    Yields:
        What takes them out again.
    """
    module = model.get_submodule(site.gate)

    def gated(value: torch.Tensor) -> torch.Tensor:
        return (hook(module, (value,)) or (value,))[0]

    if site.kind == "neurons":
        yield OpenExperts(module, gated)
        return

    def weigh(_: nn.Module, args: tuple) -> tuple:
        hidden_states, chosen, weights = args
        spread = weights.new_zeros(len(weights), site.size).scatter_add(1, chosen, weights)
        return hidden_states, chosen, gated(spread).gather(1, chosen)

    yield GatedRouter(model.get_submodule(site.experts.router), site, masks)
    yield module.register_forward_pre_hook(weigh)


class GatedRouter:
    """Lets the router of a site choose among the open experts only, until it is removed.

    Parameters are not touched: while the router runs, its slices stand before them.
    """

    def __init__(self, router: nn.Module, site: Site, masks: Masks) -> None:
        self.site, self.masks = site, masks
        inside = site.experts.router[len(site.path) + 1 :] + "."
        self.counts = [n.removeprefix(inside) for n, _ in site.attributes if n.startswith(inside)]
        self.clipped = [
            n.removeprefix(inside) for n in site.experts.clipped if n.startswith(inside)
        ]
        own = [(f"{cut.module}.", cut.tensor) for cut in site.cuts]
        self.tensors = [
            (router.get_submodule(module[len(site.experts.router) + 1 : -1]), name)
            for module, name in own
            if module.startswith(f"{site.experts.router}.")
        ]
        self._stock: dict[str, Any] = {}
        self._kept: torch.Tensor | None = None
        self._handles: list[RemovableHandle] = [
            router.register_forward_pre_hook(self._narrow),
            router.register_forward_hook(self._widen, always_call=True),
        ]

    def remove(self) -> None:
        """Let the router choose among all experts again."""
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


class OpenExperts:
    """Runs the experts of a module so that their neurons can be gated, until it is removed."""

    def __init__(self, module: nn.Module, inside: Inside) -> None:
        self.module = module
        self.before = vars(module).get("forward")

        def forward(
            hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
        ) -> torch.Tensor:
            return run_experts(module, hidden_states, chosen, weights, inside)

        vars(module)["forward"] = forward

    def remove(self) -> None:
        """Let the module run as before."""
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
    """Run the experts of a module, expert by expert.

    Args:
        module: The module that holds them.
        hidden_states: `[tokens, features]`.
        chosen: The experts of each token, `[tokens, chosen]`.
        weights: How much each counts, `[tokens, chosen]`.
        inside: What is done to the neurons.

    Returns:
        `[tokens, features]`.
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
