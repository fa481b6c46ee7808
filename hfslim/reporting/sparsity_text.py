"""The table and the sentences on zero weights, for reports and model cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEADINGS = ("modules", "weights", "zero", "pattern")
Rows = Sequence[Mapping[str, Any]]
"""Rows of `WeightSparsity.to_dict`: one for each kind of module, the last for all."""


def table_rows(rows: Rows) -> list[tuple[str, str, str, str]]:
    """Return the rows of a table under `HEADINGS`.

    Examples:
        >>> table_rows([{"kind": "all", "weights": 2048, "sparsity": 0.5, "pattern": "2:4"}])
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
    """Return one sentence on the share of zeros, and their pattern."""
    pattern = f" in the pattern {rows[-1]['pattern']}" if rows[-1]["pattern"] else ""
    return f"{rows[-1]['sparsity']:.1%} of the weights of its encoder are zero{pattern}."


def speed_note(rows: Rows) -> str:
    """Return what the zeros gain in speed and size."""
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
