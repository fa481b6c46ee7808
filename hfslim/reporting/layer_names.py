"""Sort the dotted paths of layers, and shorten them for labels."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["natural_key", "short_names"]


def natural_key(path: str) -> list[tuple[int, str]]:
    """Return a sort key that puts `layer.2` before `layer.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def short_names(paths: Sequence[str]) -> tuple[list[str], str]:
    """Return the parts in which paths differ, and ` in ` with their common pattern.

    Examples:
        >>> short_names(["encoder.0.mlp", "encoder.1.mlp"])
        (['0', '1'], ' in encoder.*.mlp')
    """
    parts = [path.split(".") for path in paths]
    if len(paths) == 1:
        return list(paths), ""
    room = min(map(len, parts)) - 1
    lead = _common(parts, room)
    tail = _common([part[::-1] for part in parts], room - lead)
    pattern = ".".join([*parts[0][:lead], "*", *parts[0][len(parts[0]) - tail :]])
    return [".".join(part[lead : len(part) - tail]) for part in parts], f" in {pattern}"


def _common(parts: Sequence[Sequence[str]], most: int) -> int:
    """Count the leading parts, up to `most`, that all paths share."""
    count = 0
    while count < most and len({part[count] for part in parts}) == 1:
        count += 1
    return count
