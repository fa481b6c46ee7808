"""The curves of a training for the report: the Trainer's log, thinned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["training_curves"]

POINTS = 100
NOT_CURVES = (
    *("step", "epoch", "total_flos", "train_", "units_"),
    *("eval_runtime", "eval_samples", "eval_steps"),
)


def training_curves(log: Sequence[Mapping[str, Any]], most: int = POINTS) -> dict[str, Any]:
    """Return each figure of a Trainer's `log_history` over the steps, thinned evenly.

    Args:
        log: The entries, each with its `step`.
        most: The greatest number of points of a curve, the first and the last among them.

    Returns:
        `{name: {"step": [...], "value": [...]}}`, without values that are not finite.

    Examples:
        >>> training_curves([{"loss": 0.5, "step": 1}, {"loss": 0.25, "step": 2}])
        {'loss': {'step': [1, 2], 'value': [0.5, 0.25]}}
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in log:
        for name, value in entry.items():
            known = isinstance(value, int | float) and math.isfinite(value)
            if known and not name.startswith(NOT_CURVES):
                curves.setdefault(name, []).append((int(entry["step"]), float(f"{value:.6g}")))
    for name, points in curves.items():
        if len(points) > most:
            chosen = (round(i * (len(points) - 1) / (most - 1)) for i in range(most))
            curves[name] = [points[place] for place in chosen]
    return {
        name: {"step": [step for step, _ in points], "value": [value for _, value in points]}
        for name, points in curves.items()
    }
