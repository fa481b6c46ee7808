"""What a report tells of the zeros among a model's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEADINGS = ("modules", "weights", "zero", "pattern")
Rows = Sequence[Mapping[str, Any]]
"""As `WeightSparsity.to_dict` gives them: one for each kind of module, the last for all."""


def cells(rows: Rows) -> list[tuple[str, str, str, str]]:
    """Return the lines of a table under `HEADINGS`.

    Examples:
        >>> cells([{"kind": "all", "weights": 2048, "sparsity": 0.5, "pattern": "2:4"}])
        [('all', '2,048', '50.0%', '2:4')]
    """
    return [
        (
            row["kind"],
            f"{row['weights']:,}",
            f"{row['sparsity']:.1%}",
            (row["pattern"] or "unstructured") if row["sparsity"] else "dense",
        )
        for row in rows
    ]


def summary(rows: Rows) -> str:
    """Return one sentence on all of them."""
    pattern = f" in the pattern {rows[-1]['pattern']}" if rows[-1]["pattern"] else ""
    return f"Of the weights of its encoder {rows[-1]['sparsity']:.1%} are zero{pattern}."


def use(rows: Rows) -> str:
    """Return what the zeros are good for, and what not."""
    text = (
        "Dense kernels multiply zeros like any other number: they bring no speed, and no smaller "
        "file, only one that compresses better."
    )
    if any(row["pattern"] == "2:4" for row in rows):
        text += (
            " CUDA devices of compute capability 8.0 or more have kernels for 2:4 "
            "(`hfslim.semi_structured`): not measured."
        )
    return text
