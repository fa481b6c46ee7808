"""What a stage leaves for the report: its log, thinned, and its units, kept and scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hfslim.anatomy.structure import Kind, Structure
from hfslim.reporting.heatmap import means_of_neighbours

__all__ = ["series_of", "units_of"]

POINTS = 100
CELLS = 96
NOT_SERIES = ("step", "epoch", "total_flos", "train_", "eval_runtime", "eval_samples", "eval_steps")


def series_of(log: Sequence[Mapping[str, Any]], most: int = POINTS) -> dict[str, Any]:
    """Return each figure of a Trainer's `log_history` over the steps, thinned evenly.

    Args:
        log: The entries, each with its `step`.
        most: Number of points kept at most, the first and the last among them.

    Returns:
        `{name: {"step": [...], "value": [...]}}`; values that are not finite are left out.

    Examples:
        >>> series_of([{"loss": 0.5, "step": 1}, {"loss": 0.25, "step": 2}])
        {'loss': {'step': [1, 2], 'value': [0.5, 0.25]}}
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in log:
        for name, value in entry.items():
            if isinstance(value, int | float) and math.isfinite(value):
                if not name.startswith(NOT_SERIES):
                    found.setdefault(name, []).append((int(entry["step"]), _short(value)))
    return {name: _columns(_thinned(points, most)) for name, points in found.items()}


def units_of(
    structure: Structure,
    scores: Mapping[tuple[Kind, str], torch.Tensor] | None = None,
    most: int = CELLS,
) -> list[dict[str, Any]]:
    """Return the units of each site from the first to the last: kept or not, and how important.

    Args:
        structure: What is kept.
        scores: Importance by kind and path, `[units]`.
        most: Cells for each site; where it has more units, a cell is the mean of neighbours.

    Returns:
        Rows of `kind`, `path`, `total`, `kept` (1 and 0, or shares) and `importance` (None if not
        known).
    """
    rows = []
    for entry in structure.entries:
        whole = torch.zeros(entry.total)
        whole[list(entry.kept)] = 1
        scored = (scores or {}).get((entry.kind, entry.path))
        known = scored is not None and len(scored) == entry.total
        rows.append(
            {
                "kind": entry.kind,
                "path": entry.path,
                "total": entry.total,
                "kept": _cells(whole, most),
                "importance": _cells(scored.detach(), most)
                if known and scored is not None
                else None,
            }
        )
    return rows


def _cells(values: torch.Tensor, most: int) -> list[float]:
    return [_short(mean) for mean in means_of_neighbours(values.cpu().double(), most).tolist()]


def _thinned(points: list[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _columns(points: list[tuple[int, float]]) -> dict[str, list[float]]:
    return {"step": [step for step, _ in points], "value": [value for _, value in points]}


def _short(value: float) -> float:
    return float(f"{value:.6g}")
