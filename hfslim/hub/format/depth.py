"""Tell a stock config how many layers are left of a model."""

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
"""By list of layers, the kind of attention of each, where the config tells it by position."""


@dataclass(frozen=True)
class Depth:
    """A change of depth: the list of layers, the config that tells it, and what it said before."""

    path: str
    config: PreTrainedConfig
    old: Fields


def configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return a model's config and those inside."""
    inside = (getattr(model.config, name, None) for name in model.config.sub_configs)
    return [model.config, *(c for c in inside if isinstance(c, PreTrainedConfig))]


def set_depth(model: PreTrainedModel, before: Units, structure: Structure) -> list[Depth]:
    """Write the new number of layers into the config fields that held the old one.

    Args:
        model: The model, already cut, or about to be.
        before: The units before the cut.
        structure: The structure it is cut to.

    Returns:
        What was changed.
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
    told = []
    for site in lists:
        config = _config_around(model, site.path)
        others = [s for s in lists if s is not site]
        alone = all(_config_around(model, s.path) is not config for s in others) and site.uses == 1
        if _is_cut(structure, site.path) and alone and any(config is c for c in inside):
            kept = structure.kept("layers", site.path)
            fields = _depth_fields(config, site.size, kept)
            if fields:
                told.append(Depth(site.path, *_change(config, fields)))
    return told


def layer_types(model: PreTrainedModel, units: Units) -> Types:
    """Return what each layer finds in `layer_types` of its config, by list of layers."""
    found = {}
    for site in units:
        types = _types(_config_around(model, site.path))
        if site.kind == "layers" and len(types) >= site.size:
            found[site.path] = types[: site.size]
    return found


def check_layer_types(model: PreTrainedModel, before: Types, structure: Structure) -> None:
    """Check that the layers that stay go on finding their own type in the config.

    When they run, they look up by their position which kind of attention they get. Where that
    differs in its window alone, no short input shows a wrong one.

    Args:
        model: The model, cut, its config brought up to date.
        before: What `layer_types` told of it before.
        structure: The structure it was cut to.

    Raises:
        RuntimeError: Some would find that of another.
    """
    for path, types in before.items():
        kept = structure.kept("layers", path)
        now = _types(_config_around(model, path))[: len(kept)]
        if now != [types[i] for i in kept]:
            raise RuntimeError(
                f"with the layers {list(kept)} of {path!r} alone, its config would tell some the "
                f"attention of others (layer_types {now}, where they had "
                f"{[types[i] for i in kept]}); nothing was changed. Leave layers out of `units`, "
                "or let the last ones go"
            )


def _types(config: PreTrainedConfig) -> list[str]:
    """Return a config's type of each layer; what its class lists are the types that there are."""
    listed = isinstance(getattr(type(config), "layer_types", None), list | tuple)
    return [] if listed else list(getattr(config, "layer_types", None) or ())


def _depth_fields(config: PreTrainedConfig, size: int, kept: tuple[int, ...]) -> Fields:
    fields: Fields = {}
    for name in DEPTH_FIELDS:
        if getattr(config, name, None) == size:
            fields[name] = len(kept)
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
