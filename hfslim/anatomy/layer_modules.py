"""The layers of a model as modules, in the order of the forward pass."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hfslim.anatomy.adapters import plain_twin
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
