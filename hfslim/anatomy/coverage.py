"""What can be cut from which model type, as the sweep over all types found it.

The table is measured, not written: `python tests/support/sweep.py --write` builds each type of the
three auto classes tiny, cuts it kind by kind, and keeps here what came out.
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
"""Outcomes, and how the table shows them."""


@dataclass(frozen=True)
class Coverage:
    """What one model type can lose.

    Attributes:
        task: `text`, `image` or `audio`.
        model_type: The type as transformers names it.
        outcomes: By kind of unit: `exact` (gated, cut and reloaded outputs are equal), `refused`
            (with the reason), `failed` (an error, so nothing is cut), `absent` (the type has no
            such part) or `untried`.
        plain: Kinds whose uniform cut the type's own config describes, so that the result loads
            with nothing of hfslim's.
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
    """List what each model type of the classification auto classes can lose.

    Args:
        tasks: Which auto classes.

    Returns:
        One row a type, in the order of the tasks and of the alphabet.

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


def shares(rows: Sequence[Coverage]) -> dict[str, tuple[int, int]]:
    """Count the types that are cut exactly, of those with such units that could be built.

    Heads and channels make one count, neurons and experts another: each is a way of narrowing the
    same part of a layer. A type that has no such part counts in neither number.

    Args:
        rows: The types.

    Returns:
        Number cut exactly and number of types, for `heads or channels`, `neurons` and `layers`.
    """
    built = [row for row in rows if {"exact", "refused"} & set(row.outcomes.values())]
    counts = {}
    for name, kinds in (
        ("heads or channels", ("heads", "channels")),
        ("neurons", ("neurons", "experts")),
        ("layers", ("layers",)),
    ):
        found = [{row.outcomes[kind] for kind in kinds} for row in built]
        present = [outcomes for outcomes in found if outcomes - {"absent", "untried"}]
        counts[name] = sum("exact" in outcomes for outcomes in present), len(present)
    return counts


def markdown(rows: Sequence[Coverage]) -> str:
    """Return a Markdown table of the rows."""
    head = ("type", *COLUMNS, "plain reload")
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        signs = (SIGNS[row.outcomes[kind]] for kind in COLUMNS)
        lines.append(" | ".join((f"`{row.model_type}`", *signs, ", ".join(row.plain))))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def page() -> str:
    """Return the page of the documentation that tells the coverage."""
    titles = {"text": "Text", "image": "Images", "audio": "Speech and audio"}
    counts = [f"{name} of {exact} of {all_}" for name, (exact, all_) in shares(coverage()).items()]
    parts = [_INTRODUCTION.format(version=measured()["transformers"], shares=", ".join(counts))]
    for task, title in titles.items():
        rows = coverage([task])
        parts.append(f"## {title}\n\n{markdown(rows)}")
    reasons = [
        f"- `{row.model_type}`, {kind}: {reason}"
        for row in coverage()
        for kind, reason in row.reasons.items()
    ]
    return "\n".join([*parts, "## Why not\n", *reasons]) + "\n"


_INTRODUCTION = """# Model families

What can be removed from which type of classifier, as the sweep over all types of the three auto
classes of transformers {version} found it: each type is built tiny and cut kind by kind, under
eager and sdpa attention. `yes`: gated, cut and reloaded outputs are equal, after a second cut too.
`refused`: not offered, or taken back, with the reason; `no`: it fails with an error. `–`: the type
has no such part. Empty: not tried. Nothing is cut wrongly without an error: a cut that does not
equal its gates is taken back, and a warning tells where it changes too little for that to be seen.

"Plain reload" names the kinds of unit whose uniform cut (the same number everywhere) the type's own
config describes, so that the result loads with nothing of hfslim's; all other results load after
`import hfslim`, or with `trust_remote_code=True`.

Of the types that could be built and have such parts, there can be cut: {shares}.

A type that is not here, or a model of your own: [how to add a family](add_a_family.md). This page
is written by `python tests/support/sweep.py --write`.
"""
