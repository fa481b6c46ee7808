"""Find mixtures of experts: whole experts, and the neurons inside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from hfslim.anatomy import mixtures
from hfslim.anatomy.projections import own_tensors
from hfslim.anatomy.slices import Cut, Feed
from hfslim.anatomy.structure import Kind
from hfslim.anatomy.units import ExpertPart, Refusal, Site

_OUTPUT = mixtures.EXPERTS_OUTPUT
KINDS_INSIDE: tuple[Kind, ...] = ("neurons", "experts")


def find_experts(path: str, modules: Mapping[str, nn.Module]) -> Iterator[Site | Refusal]:
    """Yield the experts of a module and the neurons inside them, or why they cannot go.

    All experts of a module lie in the same tensors, `[experts, …, …]`, so that all have the same
    number of neurons. The kernels take multiples of eight: one unit is eight neurons in a row of
    every expert.
    """
    module: Any = modules[path]
    reason = mixtures.SORTED_EXPERTS.get(type(module).__name__)
    if reason:
        yield from (Refusal(kind, path, reason) for kind in KINDS_INSIDE)
    if not is_fused(module):
        return
    if getattr(module, "_is_expert_parallel", False):
        yield from (Refusal(k, path, "its experts are spread over processes") for k in KINDS_INSIDE)
        return
    first = mixtures.EXPERTS_INPUT[0 if module.has_gate else 1]
    blocks = 2 if module.has_gate else 1
    tensors = own_tensors(module)
    if not all(name in tensors and tensors[name].ndim == 3 for name in (first, _OUTPUT)):
        return
    total, size = tensors[_OUTPUT].shape[0], tensors[_OUTPUT].shape[2 - module.is_transposed]
    # The rows of gate and up lie one after the other, or alternate.
    width = math.gcd(size, mixtures.NEURONS_AT_ONCE)
    widths = (width,) * blocks if module.is_concatenated else (blocks * width,)
    rows, columns = (2, 1) if module.is_transposed else (1, 2)
    cuts = [Cut(path, first, rows, widths), Cut(path, _OUTPUT, columns, (width,))]
    bias = f"{first}{mixtures.EXPERTS_BIAS}"
    if module.has_bias:
        cuts.append(Cut(path, bias, 1, widths))
    block = modules[path.rpartition(".")[0]]
    holders = [("", vars(module)), ("^", vars(block))]
    yield Site(
        kind="neurons",
        path=path,
        size=size // width,
        feeds=(Feed(path, width=width),),
        cuts=tuple(cuts),
        attributes=tuple(
            (f"{where}{name}", width)
            for where, settings in holders
            for name in mixtures.NEURON_COUNTS
            if settings.get(name) == size
        ),
        experts=ExpertPart(inside=True),
    )
    yield _experts(path, modules, total)


def is_fused(module: nn.Module) -> bool:
    """Return whether a module holds all experts in one tensor, as transformers does."""
    settings = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    return hasattr(type(module), "_apply_gate") and all(name in vars(module) for name in settings)


def _experts(path: str, modules: Mapping[str, nn.Module], total: int) -> Site | Refusal:
    block = path.rpartition(".")[0]
    routers = [
        name
        for name, module in modules[block].named_children()
        if _first(module, mixtures.CHOSEN_EXPERTS)
        and any(tensor.shape[:1] == (total,) for tensor in module.state_dict().values())
    ]
    if len(routers) != 1:
        return Refusal("experts", block, f"found no router beside {path!r}")
    router = modules[f"{block}.{routers[0]}"]
    if (_first(router, mixtures.EXPERT_GROUPS) or 1) > 1:
        return Refusal("experts", block, "its router chooses groups of experts first")
    inside = [name for name, _ in modules[block].named_modules() if name]
    parts = [n for n in inside if f"{n}.".startswith((f"{routers[0]}.", path[len(block) + 1 :]))]
    cuts = [
        Cut(f"{block}.{part}", name, 0)
        for part in parts
        for name, tensor in own_tensors(modules[f"{block}.{part}"]).items()
        if tensor.shape[:1] == (total,)
    ]
    around = {"": modules[block]} | {f"{part}.": modules[f"{block}.{part}"] for part in parts}
    settings = [(f"{p}{name}", name, v) for p, m in around.items() for name, v in vars(m).items()]
    chosen = _first(router, mixtures.CHOSEN_EXPERTS)
    return Site(
        kind="experts",
        path=block,
        size=total,
        feeds=(Feed(path),),
        cuts=tuple(cuts),
        attributes=tuple(
            (where, 1)
            for where, name, value in settings
            if name in mixtures.EXPERT_COUNTS and value == total
        ),
        fixed=(0, 1) if type(router).__name__ in mixtures.TWO_EXPERTS_STAY else (),
        experts=ExpertPart(
            inside=True,
            router=f"{block}.{routers[0]}",
            chosen=chosen,
            clipped=tuple(
                where
                for where, name, value in settings
                if name in mixtures.CHOSEN_EXPERTS and value == chosen
            ),
        ),
    )


def _first(module: nn.Module, names: tuple[str, ...]) -> int:
    values: Iterator[Any] = (vars(module).get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value), 0)
