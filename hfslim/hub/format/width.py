"""Tell a stock config how wide the residual stream is that is left of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hfslim.anatomy.config_fields import GROUP_FIELDS, HEAD_SIZE_FIELDS, STREAM_FIELDS
from hfslim.anatomy.structure import Structure
from hfslim.anatomy.units import Units

__all__ = ["new_widths", "tell_widths", "with_widths"]

Fields = dict[str, Any]


def new_widths(before: Units, structure: Structure) -> dict[int, int]:
    """Return what has become of each width that was cut; nothing where one became several."""
    found: dict[int, set[int]] = {}
    for site in before:
        if site.kind == "dimensions":
            entries = sum(site.cuts[0].widths)
            left = len(structure.kept(site.kind, site.path))
            found.setdefault(site.size * entries, set()).add(left * entries)
    if any(len(left) > 1 for left in found.values()):
        return {}
    return {old: left.pop() for old, left in found.items() if left != {old}}


def with_widths(
    proposals: Iterator[Fields], config: PreTrainedConfig, before: Units, structure: Structure
) -> Iterator[Fields]:
    """Add the width of the stream to proposed config fields; as they are where it is not cut.

    The fields that tell most come first: several numbers of heads may give the same shapes.
    """
    widths = new_widths(before, structure)
    stream = {
        name: widths[value]
        for name in STREAM_FIELDS
        if isinstance(value := getattr(config, name, None), int) and value in widths
    }
    if not stream:
        yield from proposals
        return
    for site in before:
        for name in GROUP_FIELDS if site.kind == "dimensions" and site.masked_norms else ():
            if getattr(config, name, None) == site.size:
                stream[name] = len(structure.kept(site.kind, site.path))
    for fields in reversed(list(proposals)):
        bare = {name: v for name, v in fields.items() if name not in HEAD_SIZE_FIELDS}
        # Most families read no size of a head, where they have not declared one.
        if bare != fields and not any(hasattr(config, name) for name in HEAD_SIZE_FIELDS):
            yield bare | stream
        yield fields | stream


def tell_widths(
    model: nn.Module, settings: Mapping[str, Mapping[str, Any]], widths: Mapping[int, int]
) -> list[tuple[dict[str, Any], Fields]]:
    """Bring settings that hold a width that was cut up to date.

    Args:
        model: The model.
        settings: Those that may, by module, with their values.
        widths: The new width for each old one.

    Returns:
        The modules' settings that were changed, with what they were.
    """
    told = []
    for path, values in settings.items():
        own = vars(model.get_submodule(path))
        old = {name: own[name] for name in values if own[name] in widths}
        own.update({name: widths[value] for name, value in old.items()})
        told.append((own, old))
    return told
