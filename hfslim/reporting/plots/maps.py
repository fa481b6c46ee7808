"""Maps of a model: which units are kept, and how much each matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hfslim.reporting.picture import natural, short_names
from hfslim.reporting.plots.style import Plot, Theme, new_figure
from hfslim.reporting.report import Report
from hfslim.reporting.tables import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
FEW = 400
"""Cells up to which each is drawn as a square of its own."""
WIDEST = 47
"""Letters of a title that have room."""
ROOM = 0.17
"""Inches for each line."""


def structure(report: Report) -> Plot | None:
    """Draw which units are kept, layer by layer: one map for each kind."""
    if not report.units:
        return None
    panels = _panels(report.units)
    parts = [_told(kind, rows) for (_, kind), rows in panels.items()]

    def draw(theme: Theme) -> Figure:
        figure, axes = _stack(panels)
        for one, ((stage, kind), rows) in zip(axes, panels.items(), strict=True):
            labels, pattern = short_names([row["path"] for row in rows])
            totals = [row["total"] for row in rows]
            counts = [f"{round(_share(row) * row['total']):,}" for row in rows]
            _lines(one, labels, f"{_title(panels, stage, kind)}{pattern}")
            if max(totals) * len(rows) <= FEW:
                _squares(one, [row["kept"] for row in rows], theme)
            else:
                _bands(one, [row["kept"] for row in rows], theme)
            for line, count in enumerate(counts):
                one.annotate(
                    f"{count} of {totals[line]:,}",
                    (1.02, line),
                    xycoords=("axes fraction", "data"),
                    va="center",
                    fontsize=6.5,
                    color=theme.muted,
                )
        return figure

    rows = [
        (stage, row["path"], kind, f"{round(_share(row) * row['total']):,}", f"{row['total']:,}")
        for (stage, kind), lines in panels.items()
        for row in lines
    ]
    table = Section(
        "Kept", ("stage", "layer", "units", "kept", "of"), rows, code=(1,), right=(3, 4)
    )
    alt = (
        "Maps with a line for each layer and its units from left to right; filled is kept, hollow "
        f"or pale is removed. {' '.join(parts)}"
    )
    return Plot("structure", "What is kept", alt, draw, table)


def importance(report: Report) -> Plot | None:
    """Draw how much each unit mattered when it was decided on: one heat map for each kind."""
    scored = [row for row in report.units if row.get("importance")]
    if not scored:
        return None
    panels = _panels(scored)

    def draw(theme: Theme) -> Figure:
        figure, axes = _stack(panels)
        for one, ((stage, kind), rows) in zip(axes, panels.items(), strict=True):
            labels, pattern = short_names([row["path"] for row in rows])
            _lines(one, labels, f"{_title(panels, stage, kind)}{pattern}")
            grid = _grid([row["importance"] for row in rows])
            top = max(float(np.nanmax(grid)), 1e-30)
            # Most units matter little: the square root keeps them apart.
            image = one.imshow(
                np.sqrt(np.clip(grid / top, 0, None)),
                aspect="auto",
                vmin=0,
                vmax=1,
                cmap="cividis",
                interpolation="nearest",
            )
            bar = figure.colorbar(image, ax=one, pad=0.02, fraction=0.06, ticks=[0, 0.5, 1])
            bar.ax.set_yticklabels(["0", "¼", "max"], fontsize=6.5)
            bar.outline.set_visible(False)
        return figure

    rows = []
    for (stage, kind), lines in panels.items():
        total = sum(sum(row["importance"]) * row["total"] / len(row["importance"]) for row in lines)
        for row in lines:
            own = sum(row["importance"]) * row["total"] / len(row["importance"])
            share = f"{own / total:.1%}" if total else "-"
            rows.append((stage, row["path"], kind, share, f"{max(row['importance']):.3g}"))
    headings = ("stage", "layer", "units", "share of all", "greatest")
    table = Section("Importance", headings, rows, code=(1,), right=(3, 4))
    top = [
        f"Of the {kind}, those of {max(lines, key=lambda row: sum(row['importance']))['path']} "
        "matter most."
        for (_, kind), lines in panels.items()
        if len(lines) > 1
    ]
    alt = (
        "Heat maps with a line for each layer and its units from left to right, from dark for "
        f"unimportant to bright for the most important of the kind. {' '.join(top)}"
    )
    return Plot("importance", "What matters", alt, draw, table)


def _panels(units: Rows) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Return the rows of each stage and kind, layers in order."""
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in sorted(units, key=lambda row: natural(row["path"])):
        panels.setdefault((row["stage"], row["kind"]), []).append(row)
    order = {key: place for place, key in enumerate(dict.fromkeys(map(_place, units)))}
    return dict(sorted(panels.items(), key=lambda item: order[item[0]]))


def _place(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["stage"], row["kind"]


def _title(panels: Mapping[tuple[str, str], Rows], stage: str, kind: str) -> str:
    several = len({stage for stage, _ in panels}) > 1
    return f"{stage}: {kind}" if several else kind


def _share(row: Mapping[str, Any]) -> float:
    return float(np.mean(row["kept"])) if row["kept"] else 0.0


def _told(kind: str, rows: Rows) -> str:
    kept = round(sum(_share(row) * row["total"] for row in rows))
    total = sum(row["total"] for row in rows)
    least = min(rows, key=_share)
    where = f", fewest in {least['path']} ({_share(least):.0%})" if len(rows) > 1 else ""
    return f"{kept:,} of {total:,} {kind} are kept{where}."


def _stack(panels: Mapping[Any, Rows]) -> tuple[Figure, list[Any]]:
    lines = [max(len(rows), 2) for rows in panels.values()]
    height = ROOM * sum(lines) + 0.42 * len(lines)
    return new_figure(height, len(lines), height_ratios=lines)


def _lines(axes: Any, labels: Sequence[str], title: str) -> None:
    # What ends a pattern tells more than what begins it.
    kind, told, pattern = title.partition(" in ")
    room = WIDEST - len(kind) - len(told)
    short = pattern if len(pattern) <= room else f"…{pattern[1 - room :]}"
    axes.set_title(f"{kind}{told}{short}", fontsize=7.5)
    step = max(1, len(labels) // 24)
    axes.set_yticks(range(0, len(labels), step), labels[::step], fontsize=6.5)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xticks([])
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _squares(axes: Any, kept: Sequence[Sequence[float]], theme: Theme) -> None:
    for full in (False, True):
        found = [
            (x, y) for y, row in enumerate(kept) for x, v in enumerate(row) if (v > 0.5) is full
        ]
        if found:
            axes.scatter(
                *zip(*found, strict=True),
                marker="s",
                s=36,
                facecolors=theme.series[0] if full else "none",
                edgecolors=theme.series[0] if full else theme.muted,
                linewidths=0.7,
            )
    axes.set_xlim(-0.6, max(map(len, kept)) - 0.4)


def _bands(axes: Any, kept: Sequence[Sequence[float]], theme: Theme) -> None:
    """Draw shares as the height of bars in each line's band, over a pale ground."""
    for line, row in enumerate(kept):
        edges = np.linspace(0, 1, len(row) + 1)
        axes.barh(line, 1, height=0.8, color=theme.grid, linewidth=0)
        top = line + 0.4
        axes.stairs(
            top - 0.8 * np.asarray(row), edges, baseline=top, fill=True, color=theme.series[0]
        )
    axes.set_xlim(0, 1)


def _grid(rows: Sequence[Sequence[float]]) -> np.ndarray:
    grid = np.full((len(rows), max(map(len, rows))), np.nan)
    for line, row in enumerate(rows):
        grid[line, : len(row)] = row
    return grid
