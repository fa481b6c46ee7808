"""The units that can be cut from each model type, as a sweep over all types found them.

The table is measured: `python tests/support/sweep.py --write` builds each type of the three auto
classes tiny, cuts it kind by kind, and writes the outcomes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

COLUMNS = ("heads", "neurons", "channels", "experts", "layers", "dimensions")
SIGNS = {"exact": "yes", "refused": "refused", "failed": "no", "absent": "–", "untried": ""}
"""Outcomes, and their signs in tables."""


@dataclass(frozen=True)
class Coverage:
    """The kinds of unit that can be cut from one model type.

    Attributes:
        task: `text`, `image` or `audio`.
        model_type: The type as transformers names it.
        outcomes: By kind of unit: `exact` (gated, cut and reloaded outputs are equal), `refused`
            (with the reason), `failed` (an error, so nothing is cut), `absent` (the type has no
            such part) or `untried`.
        plain: Kinds whose uniform cut the type's own config describes, so that the result loads
            without hfslim.
        reasons: Why kinds are refused, or fail.
    """

    task: str
    model_type: str
    outcomes: Mapping[str, str]
    plain: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)


@cache
def measured() -> dict[str, Any]:
    """Return the sweep's record: `transformers`, its version, and `types`, by task and type."""
    return json.loads(files(__package__).joinpath("coverage.json").read_text())


def coverage(tasks: Sequence[str] = ("text", "image", "audio")) -> tuple[Coverage, ...]:
    """List the kinds of unit that can be cut from each type of the classification auto classes.

    Returns:
        One row per type, by task and then by name.

    Examples:
        >>> next(r for r in coverage(["text"]) if r.model_type == "bert").outcomes["heads"]
        'exact'
    """
    return tuple(
        Coverage(
            task,
            name,
            {kind: entry.get(kind, "untried") for kind in COLUMNS},
            tuple(entry.get("plain", ())),
            entry.get("reasons", {}),
        )
        for task in tasks
        for name, entry in sorted(measured()["types"].get(task, {}).items())
    )
