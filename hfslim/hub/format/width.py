"""The config fields that describe the widths of a pruned model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hfslim.anatomy import families
from hfslim.anatomy.config_fields import (
    CHOSEN_EXPERTS_FIELD,
    EXPERT_COUNT_FIELDS,
    EXPERT_WIDTH_FIELDS,
    GROUP_FIELDS,
    HEAD_SIZE_FIELDS,
    STREAM_FIELDS,
    WIDTH_FIELDS,
)
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.structure import Structure
from hfslim.anatomy.units import Site, Units

__all__ = ["new_widths", "proposals", "set_widths"]

Fields = dict[str, Any]


def proposals(model: PreTrainedModel, before: Units, structure: Structure) -> Iterator[Fields]:
    """Propose config changes that may describe every width, the smallest change first.

    Where the residual stream was cut, its width is part of each proposal, and the largest change
    comes first: several numbers of heads may give the same shapes.
    """
    stream = _stream_fields(model.config, before, structure)
    if not stream:
        yield from _unit_fields(model)
        return
    for fields in reversed(list(_unit_fields(model))):
        bare = {name: v for name, v in fields.items() if name not in HEAD_SIZE_FIELDS}
        # Most families read no size of a head, where they have not declared one.
        if bare != fields and not any(hasattr(model.config, name) for name in HEAD_SIZE_FIELDS):
            yield bare | stream
        yield fields | stream


def new_widths(before: Units, structure: Structure) -> dict[int, int]:
    """Return the new width for each old one; empty if equal widths became different ones."""
    found: dict[int, set[int]] = {}
    for site in before:
        if site.kind == "dimensions":
            entries = sum(site.cuts[0].widths)
            left = len(structure.kept(site.kind, site.path))
            found.setdefault(site.size * entries, set()).add(left * entries)
    if any(len(left) > 1 for left in found.values()):
        return {}
    return {old: left.pop() for old, left in found.items() if left != {old}}


def set_widths(
    model: nn.Module, settings: Mapping[str, Mapping[str, Any]], widths: Mapping[int, int]
) -> list[tuple[dict[str, Any], Fields]]:
    """Set the attributes of modules that hold an old width to the new one.

    Args:
        model: The model.
        settings: The attributes to consider, by path of the module.
        widths: The new width for each old one.

    Returns:
        The modules' attributes that changed, with the old values.
    """
    changed = []
    for path, values in settings.items():
        own = vars(model.get_submodule(path))
        old = {name: own[name] for name in values if own[name] in widths}
        own.update({name: widths[value] for name, value in old.items()})
        changed.append((own, old))
    return changed


def _stream_fields(config: PreTrainedConfig, before: Units, structure: Structure) -> Fields:
    """Return the config fields that describe a cut residual stream; empty if it is not cut."""
    widths = new_widths(before, structure)
    stream = {
        name: widths[value]
        for name in STREAM_FIELDS
        if isinstance(value := getattr(config, name, None), int) and value in widths
    }
    for site in before if stream else ():
        for name in GROUP_FIELDS if site.kind == "dimensions" and site.masked_norms else ():
            if getattr(config, name, None) == site.size:
                stream[name] = len(structure.kept(site.kind, site.path))
    return stream


def _unit_fields(model: PreTrainedModel) -> Iterator[Fields]:
    """Propose the config fields of heads, neurons and experts, the smallest change first."""
    by_kind: dict[str, list[Site]] = {"neurons": [], "heads": [], "inside": [], "experts": []}
    for site in find_units(model):
        kind = "inside" if site.kind == "neurons" and site.experts.inside else site.kind
        by_kind.setdefault(kind, []).append(site)
    parts = [
        _neurons(model, by_kind["neurons"], WIDTH_FIELDS),
        _heads(model, by_kind["heads"]),
        _neurons(model, by_kind["inside"], EXPERT_WIDTH_FIELDS),
        _experts(model, by_kind["experts"]),
    ]
    new = [p for p in parts if any(getattr(model.config, name, None) != p[name] for name in p)]
    for number in range(len(new) + 1):
        for some in itertools.combinations(new, number):
            yield {name: value for part in some for name, value in part.items()}


def _neurons(model: PreTrainedModel, sites: list[Site], fields: Sequence[str]) -> Fields:
    sizes = {site.size * site.width for site in sites}
    names = [name for name in fields if hasattr(model.config, name)]
    return {names[0]: sizes.pop()} if len(sizes) == 1 and names else {}


def _heads(model: PreTrainedModel, sites: list[Site]) -> Fields:
    # Many families read a head size that their config does not declare.
    field = next((n for n in HEAD_SIZE_FIELDS if hasattr(model.config, n)), "head_dim")
    heads = {(s.size, s.width, s.heads.shared) for s in sites}
    if len(heads) != 1:
        return {}
    size, features, shared = heads.pop()
    module = model.get_submodule(sites[0].path)
    declared = (vars(module).get(name) for name in families.HEAD_DIM)
    head_dim = next((value for value in declared if value), None)
    if not head_dim:
        return {}
    counts = {"num_attention_heads": size * features // head_dim, field: head_dim}
    if hasattr(model.config, "num_key_value_heads"):
        counts["num_key_value_heads"] = 1 if shared else size
    return counts


def _experts(model: PreTrainedModel, sites: list[Site]) -> Fields:
    numbers = {(site.size, site.experts.chosen) for site in sites}
    names = [name for name in EXPERT_COUNT_FIELDS if hasattr(model.config, name)]
    if len(numbers) != 1 or not names:
        return {}
    size, chosen = numbers.pop()
    return {names[0]: size, CHOSEN_EXPERTS_FIELD: chosen}
