"""Figures of a run: losses, kept units and the metric over the steps; the metric over latency."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from hfslim.measuring.class_answers import decimals
from hfslim.reporting.plots.style import DASHES, MARKS, Plot, Theme, new_figure, of_seed
from hfslim.reporting.report import Report
from hfslim.reporting.tables import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = ("kept_", "expected_", "weight_sparsity")

LINE = 0.14
"""The height of a line of text in inches."""
LETTERS = 0.023
"""The share of the width that a letter takes."""
LEGEND, BESIDE = 42, 7
"""The letters that a legend has room for, and that a further column takes for its line."""
BESIDE_POINT = ((5, -2, "left"), (-5, -2, "right"), (0, 5, "center"), (0, -10, "center"))
"""Where the seed of a point stands, in points."""
TURN = 0.6
"""The share of the width from which a stage's name stands left of its line."""


def training_course(report: Report) -> Plot | None:
    """Plot loss terms, shares of kept units and the metric over the steps of all stages."""
    runs: dict[Any, list[Mapping[str, Any]]] = {}
    for one in report.history:
        runs.setdefault(one.get("seed"), []).append(one)
    # Of several seeds all have their metric, the first its losses and shares.
    history = next(iter(runs.values()), [])
    spans = list(pairwise([0, *accumulate(one["steps"] for one in history)]))
    if not any(one["series"] for one in history):
        return None
    losses = _joined(history, spans, lambda name: "loss" in name and "eval" not in name)
    shares = _joined(history, spans, lambda name: name.startswith(SHARES))
    shares |= _steps_of_cuts(report, history, spans) if not shares else {}
    quality = report.quality[:1]
    metric = quality[0].metric if quality else ""
    digits = decimals(quality[0].examples if quality else None)
    marks = {
        seed: [
            (end, one["metrics"][metric])
            for one, end in zip(own, accumulate(one["steps"] for one in own), strict=True)
            if metric in one["metrics"]
        ]
        for seed, own in runs.items()
    }
    marks = {seed: own for seed, own in marks.items() if own}
    panels = [(what, name) for what, name in ((losses, "loss"), (shares, "share")) if what]
    several = len(panels) + bool(marks)
    begun: dict[int, str] = {}
    for stage, (start, _) in zip(history, spans, strict=True):
        begun[start] = f"{begun[start]}, {stage['stage']}" if start in begun else stage["stage"]
    rows_of_names = _rows(begun, spans[-1][1])
    named = max(rows_of_names) + 1

    def draw(theme: Theme) -> Figure:
        lines = [-(-len(series) // _columns(series)) for series, _ in panels]
        height = 0.6 + 1.45 * several + LINE * (sum(lines) - len(lines) + named - 1)
        figure, axes = new_figure(height, several, sharex=True)
        for number, (one, (series, label)) in enumerate(zip(axes, panels, strict=False)):
            for order, (name, (steps, values)) in enumerate(series.items()):
                # A colour that is used again has other dashes.
                dashes = DASHES[(order + order // len(DASHES)) % len(DASHES)]
                colour = theme.series[order % len(theme.series)]
                one.plot(steps, values, label=name, color=colour, linestyle=dashes)
            one.set_ylabel(label)
            one.set_ylim(bottom=0)
            tight = {"handlelength": 2.2, "borderaxespad": 0.1, "columnspacing": 1}
            place = (0, 1 + 0.1 * named if number == 0 else 1)
            one.legend(ncols=_columns(series), loc="lower left", bbox_to_anchor=place, **tight)
        if marks:
            for order, (seed, own) in enumerate(marks.items()):
                style = {"color": theme.series[order % 4], "marker": MARKS[order % len(MARKS)]}
                style |= {"linestyle": DASHES[order % 4], "label": f"seed {seed}"}
                axes[-1].plot(*zip(*own, strict=True), markersize=4, **style)
            if len(marks) > 1:
                axes[-1].legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1)
            axes[-1].set_ylabel(metric)
        for row, (start, name) in zip(rows_of_names, begun.items(), strict=True):
            for one in axes:
                one.axvline(start, color=theme.muted, linewidth=0.7, linestyle=(0, (2, 2)))
            axes[0].annotate(
                name,
                (start, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3 + 72 * LINE * row),
                textcoords="offset points",
                fontsize=6.5,
                ha="left" if start < TURN * spans[-1][1] else "right",
            )
        axes[-1].set_xlabel("steps of all stages")
        return figure

    rows, metrics = [], []
    for one in report.history:
        of = f"seed {one['seed']}, {one['stage']}" if "seed" in one else one["stage"]
        last = {name: values["value"][-1] for name, values in one["series"].items()}
        own = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if "loss" in name)
        after = one["metrics"].get(metric)
        rows.append(
            (of, str(one["steps"]), own or "-", "-" if after is None else f"{after:.{digits}f}")
        )
        if after is not None:
            metrics.append(f"after {of} {metric} is {after:.{digits}f}")
    headings = ("stage", "steps", "at its end", metric or "metric")
    table = Section("Stages", headings, rows, right=(1, 3))
    names = ", ".join([*losses, *shares])
    alt = f"Lines over the training steps of all stages: {names}; {'; '.join(metrics)}."
    return Plot("course", f"Training{of_seed(report)}", alt, draw, table)


def speed_cost(report: Report) -> Plot | None:
    """Plot the metric against the latency of the whole model and of each cut model."""
    points = report.curve
    if not points:
        return None
    metric, digits = report.quality[0].metric, decimals(report.quality[0].examples)
    sizes = sorted({size for point in points for size in point["latency_ms"]}, key=int)
    sizes = list(dict.fromkeys([sizes[0], sizes[-1]]))
    labels = list(dict.fromkeys(point["label"] for point in points))

    def draw(theme: Theme) -> Figure:
        figure, axes = new_figure(0.35 + 1.9 * len(sizes), len(sizes))
        for one, size in zip(axes, sizes, strict=True):
            for place, label in enumerate(labels):
                own = [p for p in points if p["label"] == label and size in p["latency_ms"]]
                times, metrics = ([p["latency_ms"][size] for p in own], [p["metric"] for p in own])
                mark, colour = MARKS[place % len(MARKS)], theme.series[(1, 2, 0, 3)[place % 4]]
                one.scatter(times, metrics, s=34, color=colour, marker=mark, label=label, zorder=3)
                for order, p in enumerate(own if len(own) > 1 else ()):
                    where = {
                        "xytext": BESIDE_POINT[order % 4][:2],
                        "ha": BESIDE_POINT[order % 4][2],
                    }
                    at = (p["latency_ms"][size], p["metric"])
                    one.annotate(
                        str(p.get("seed", "")), at, textcoords="offset points", fontsize=6, **where
                    )
            one.set_xlim(0, 1.12 * max(p["latency_ms"].get(size, 0.0) for p in points))
            one.margins(y=0.25)
            one.set_xlabel(f"ms per call of {size} example{'s' * (int(size) > 1)} (median)")
            one.set_ylabel(metric)
        axes[0].legend(loc="best")
        return figure

    rows = [
        (
            point["label"],
            "-" if point.get("seed") is None else str(point["seed"]),
            f"{point['metric']:.{digits}f}",
            f"{point['macs']:.1%}",
            *(f"{point['latency_ms'][size]:.2f}" for size in sizes),
        )
        for point in points
    ]
    headings = ("model", "seed", metric, "MACs", *(f"ms, batch {size}" for size in sizes))
    table = Section("Speed", headings, rows, right=tuple(range(1, len(headings))))
    values = [
        f"{p['label']}: {metric} {p['metric']:.{digits}f} at {p['latency_ms'][sizes[-1]]:.2f} ms"
        for p in points[:8]
    ]
    alt = f"Points of {metric} against latency, batch {sizes[-1]}: {'; '.join(values)}."
    return Plot("curve", "Metric against latency", alt, draw, table)


def _rows(begun: Mapping[int, str], end: int) -> list[int]:
    """Return for each stage the lowest row above the axes that has room for its name."""
    rows: list[list[tuple[float, float]]] = []
    places = []
    for start, name in begun.items():
        place, width = start / max(end, 1), LETTERS * len(name)
        left = place if place < TURN else place - width
        rows.append([])
        free = (all(left > r or left + width < x for x, r in row) for row in rows)
        places.append([*free].index(True))
        rows[places[-1]].append((left, left + width))
    return places


def _columns(names: Iterable[str]) -> int:
    """Return the number of columns of a legend, whose names go down first."""
    lengths = [len(name) for name in names]
    for columns in (3, 2):
        parts = np.array_split(lengths, min(columns, len(lengths)))
        if sum(max(part) for part in parts) <= LEGEND - BESIDE * (len(parts) - 1):
            return columns
    return 1


def _steps_of_cuts(
    report: Report, history: Sequence[Mapping[str, Any]], spans: Sequence[tuple[int, int]]
) -> dict[str, tuple[list[float], list[float]]]:
    """Return the kept share of each kind over the steps, for cuts that are made at once."""
    places = {one["stage"]: start for one, (start, _) in zip(history, spans, strict=True)}
    totals: dict[tuple[str, str], list[float]] = {}
    for row in report.units:
        total = totals.setdefault((row["kind"], row["stage"]), [0.0, 0.0])
        total[0] += sum(row["kept"]) / max(len(row["kept"]), 1) * row["total"]
        total[1] += row["total"]
    steps: dict[str, tuple[list[float], list[float]]] = {}
    for (kind, stage), (here, whole) in totals.items():
        at, left = steps.setdefault(f"kept_{kind}", ([0.0], [1.0]))
        at += [places[stage], places[stage]]
        left += [left[-1], left[-1] * here / whole]
    for at, left in steps.values():
        at.append(spans[-1][1])
        left.append(left[-1])
    return steps


def _joined(
    history: Sequence[Mapping[str, Any]], spans: Sequence[tuple[int, int]], wanted: Any
) -> dict[str, tuple[list[float], list[float]]]:
    """Return each series over the steps of all stages, with a gap between stages."""
    joined: dict[str, tuple[list[float], list[float]]] = {}
    for one, (start, _) in zip(history, spans, strict=True):
        for name, series in one["series"].items():
            if wanted(name):
                steps, values = joined.setdefault(name, ([], []))
                gap = [float("nan")] if steps else []
                steps += [*gap, *(start + step for step in series["step"])]
                values += [*gap, *series["value"]]
    return joined
