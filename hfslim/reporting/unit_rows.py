"""The units of a cut for the report: kept or removed, and their importance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hfslim.anatomy.structure import Key, Structure

__all__ = ["COLUMNS", "means_of_neighbours", "unit_rows"]

COLUMNS = 96
"""Cells of a row, above which units are pooled."""


def unit_rows(
    structure: Structure,
    scores: Mapping[Key, torch.Tensor] | None = None,
    most: int = COLUMNS,
) -> list[dict[str, Any]]:
    """Return a row for each layer that has units: which are kept, and their importance.

    Args:
        structure: The kept units.
        scores: Importance by kind and path, `[units]`.
        most: The greatest number of cells; with more units, a cell is the mean of neighbours.

    Returns:
        Rows of `kind`, `path`, `total`, `kept` (0 to 1) and `importance` (None if unknown).
    """
    rows = []
    for entry in structure.entries:
        kept = torch.zeros(entry.total)
        kept[list(entry.kept)] = 1
        scored = (scores or {}).get((entry.kind, entry.path))
        known = scored is not None and len(scored) == entry.total
        rows.append(
            {
                "kind": entry.kind,
                "path": entry.path,
                "total": entry.total,
                "kept": _cells(kept, most),
                "importance": _cells(scored, most) if scored is not None and known else None,
            }
        )
    return rows


def means_of_neighbours(values: torch.Tensor, most: int) -> torch.Tensor:
    """Return values, `[units]`, or the means of `most` groups of neighbours if they are more."""
    parts = values.tensor_split(max(min(most, len(values)), 1))
    return torch.stack([part.mean() for part in parts]) if len(values) else values


def _cells(values: torch.Tensor, most: int) -> list[float]:
    means = means_of_neighbours(values.detach().cpu().double(), most)
    return [float(f"{mean:.6g}") for mean in means.tolist()]
