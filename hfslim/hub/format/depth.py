"""Write the depth of a pruned model into its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hfslim.anatomy.config_fields import DEPTH_FIELDS, PER_LAYER_FIELDS
from hfslim.anatomy.structure import Structure
from hfslim.anatomy.units import Units

__all__ = ["Depth", "check_layer_types", "configs", "layer_types", "set_depth"]

Fields = dict[str, Any]
Types = Mapping[str, Sequence[str]]
"""The kind of attention of each layer, by list of layers, where the config lists it."""


@dataclass(frozen=True)
class Depth:
    """A change of depth: the list of layers, the config that holds the depth, its old fields."""

    path: str
    config: PreTrainedConfig
    old: Fields


def configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return a model's config and the configs inside it."""
    inside = (getattr(model.config, name, None) for name in model.config.sub_configs)
    return [model.config, *(c for c in inside if isinstance(c, PreTrainedConfig))]


def set_depth(model: PreTrainedModel, before: Units, structure: Structure) -> list[Depth]:
    """Write the new number of layers into the config fields that hold the old one.

    Args:
        model: The model, before the cut or after it.
        before: The units before the cut.
        structure: The structure that the model is cut to.
    """
    earlier = (getattr(model.config, "hfslim", None) or {}).get("layers", {})
    lists = [s for s in before if s.kind == "layers" and s.path not in earlier]
    if not any(_is_cut(structure, site.path) for site in lists):
        return []
    stages = [len(structure.kept("layers", site.path)) for site in lists]
    fields: Fields = {}
    for name in DEPTH_FIELDS:
        value = getattr(model.config, name, None)
        if isinstance(value, list | tuple) and list(value) == [site.size for site in lists]:
            fields[name] = type(value)(stages)
    if fields:
        change = _change(model.config, fields)
        return [Depth(site.path, *change) for site in lists]
    inside = configs(model)
    changes = []
    for site in lists:
        config = _config_around(model, site.path)
        others = [s for s in lists if s is not site]
        alone = all(_config_around(model, s.path) is not config for s in others) and site.uses == 1
        if _is_cut(structure, site.path) and alone and any(config is c for c in inside):
            fields = _depth_fields(config, site.size, structure.kept("layers", site.path))
            if fields:
                changes.append(Depth(site.path, *_change(config, fields)))
    return changes


def layer_types(model: PreTrainedModel, units: Units) -> Types:
    """Return the entries of `layer_types` in the config, by list of layers."""
    found = {}
    for site in units:
        types = _types(_config_around(model, site.path))
        if site.kind == "layers" and len(types) >= site.size:
            found[site.path] = types[: site.size]
    return found


def check_layer_types(model: PreTrainedModel, before: Types, structure: Structure) -> None:
    """Check that each kept layer still finds its own type of attention in the config.

    Layers look up their type by position when they run. Types that differ only in their window
    give equal outputs on a short input, so that a comparison of outputs can miss a wrong type.

    Args:
        model: The cut model, with its config up to date.
        before: The result of `layer_types` before the cut.
        structure: The structure that the model was cut to.

    Raises:
        RuntimeError: A layer would find another layer's type.
    """
    for path, types in before.items():
        kept = structure.kept("layers", path)
        now = _types(_config_around(model, path))[: len(kept)]
        if now != [types[i] for i in kept]:
            raise RuntimeError(
                f"with the layers {list(kept)} of {path!r} alone, its config would give some "
                f"of them the attention of others (layer_types {now}, where they had "
                f"{[types[i] for i in kept]}); nothing was changed. Leave layers out of `units`, "
                "or remove the last ones"
            )


def _types(config: PreTrainedConfig) -> list[str]:
    """Return the type of each layer; a list on the config's class names the known types instead."""
    listed = isinstance(getattr(type(config), "layer_types", None), list | tuple)
    return [] if listed else list(getattr(config, "layer_types", None) or ())


def _depth_fields(config: PreTrainedConfig, size: int, kept: tuple[int, ...]) -> Fields:
    fields: Fields = {n: len(kept) for n in DEPTH_FIELDS if getattr(config, n, None) == size}
    if not fields:
        return {}
    for name in PER_LAYER_FIELDS:
        value = getattr(config, name, None)
        if not isinstance(value, list | tuple) or _is_read_only(config, name):
            continue
        if len(value) == size:
            fields[name] = type(value)(value[i] for i in kept)
    stages = getattr(config, "stage_names", None)
    if stages and len(stages) == size + 1:
        fields["stage_names"] = stages[: len(kept) + 1]
    return fields


def _is_read_only(config: PreTrainedConfig, name: str) -> bool:
    declared = getattr(type(config), name, None)
    return isinstance(declared, property) and declared.fset is None


def _change(config: PreTrainedConfig, fields: Fields) -> tuple[PreTrainedConfig, Fields]:
    old = dict(vars(config))
    for name, value in fields.items():
        setattr(config, name, value)
    if "stage_names" in fields:
        config.set_output_features_output_indices(None, None)
    return config, old


def _config_around(model: PreTrainedModel, path: str) -> PreTrainedConfig:
    """Return the config of the innermost module around a path that has one."""
    while path:
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
        if isinstance(config, PreTrainedConfig):
            return config
    return model.config


def _is_cut(structure: Structure, path: str) -> bool:
    return any(e.path == path and e.kind == "layers" and len(e.kept) < e.total for e in structure)
