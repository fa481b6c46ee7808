"""The layers of a model as modules, and the modules that may be sharded each on its own."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hfslim.anatomy.adapters import base_of, plain_twin
from hfslim.anatomy.discovery import find_units


def layer_modules(model: nn.Module) -> list[nn.Module]:
    """Return a model's layers in the order of the forward pass, stage by stage."""
    modules = dict(model.named_modules())
    lists: dict[str, tuple[str, ...]] = {}
    for site in find_units(plain_twin(model)):
        if site.kind == "layers":
            lists[(site.path, *site.layers.beside)[-1]] = site.layers.ends[1:]
            continue
        if site.kind == "channels":
            continue  # Convolutions in front of the layers are numbered too.
        parts = site.path.split(".")
        prefixes = [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]
        whole = [p for p in prefixes if isinstance(modules[p], GradientCheckpointingLayer)]
        for prefix in (whole or prefixes)[-1:]:
            lists.setdefault(prefix.rpartition(".")[0], ())
    order = [path for path in modules if path in lists]
    layers = [
        ".".join((path, name, *lists[path])) for path in order for name in modules[path]._modules
    ]
    return [modules[path] for path in layers]


def modules_to_shard(model: Any) -> list[nn.Module]:
    """Return the modules whose parameters can be gathered one module at a time.

    These are the layers, and the tables of token embeddings outside of them. None lies inside
    another, and none shares a parameter with a module outside of it. All other parameters of the
    model belong together: modules that are not called, only read, are among them.
    """
    rows = getattr(base_of(model).config, "vocab_size", None)
    tables = [m for m in model.modules() if type(m) is nn.Embedding and m.num_embeddings == rows]
    found = [m for m in (*layer_modules(model), *tables) if next(m.parameters(), None) is not None]
    inside = {inner for module in found for inner in module.modules() if inner is not module}
    outer = [module for module in dict.fromkeys(found) if module not in inside]
    around = {inner: module for module in outer for inner in module.modules()}
    holders: dict[nn.Parameter, set[nn.Module | None]] = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[parameter].add(around.get(module))
    return [m for m in outer if all(len(holders[p]) == 1 for p in m.parameters())]
