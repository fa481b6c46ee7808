"""Pictures of a model layer by layer: the units that it keeps, and their importance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfslim.reporting.layer_names import natural_key, short_names
from hfslim.reporting.plots.heat_maps import heat_map_figure, importance_map
from hfslim.reporting.plots.style import (
    LETTER,
    ROW,
    Plot,
    Theme,
    label_rows,
    new_figure,
    of_seed,
    save,
    stacked_axes,
)
from hfslim.reporting.report import Report
from hfslim.reporting.tables import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
Panels = Mapping[tuple[str, str], Rows]
FEW = 400
"""The number of cells up to which each is drawn as a square of its own."""
BAR = 2.1
"""The width of a bar of a card's picture in inches."""


def draw_structure(rows: Rows, path: Path) -> None:
    """Draw the share of units that each layer keeps, with a panel of bars for each kind.

    Args:
        rows: One or more `{"kind", "path", "kept", "total"}`, as of `Structure.table`.
        path: The PNG file to write.
    """
    kinds = dict.fromkeys(row["kind"] for row in rows)
    layers = sorted(rows, key=lambda row: natural_key(row["path"]))
    panels = {kind: [row for row in layers if row["kind"] == kind] for kind in kinds}
    labels = {kind: short_names([row["path"] for row in panels[kind]]) for kind in kinds}
    counts = {k: [f"{row['kept']:,} / {row['total']:,}" for row in panels[k]] for k in kinds}
    widths = {
        kind: BAR + 0.3 + LETTER * (max(map(len, names)) + max(map(len, counts[kind])))
        for kind, (names, _) in labels.items()
    }
    most = max(map(len, panels.values()))

    def draw(theme: Theme) -> Figure:
        figure, axes = new_figure(0.5 + ROW * most, 1, len(kinds), sum(widths.values()))
        for place, (kind, colour) in zip(axes, _colours(kinds, theme).items(), strict=True):
            names, pattern = labels[kind]
            label_rows(place, names, f"{kind}{pattern}", widths[kind])
            shares = [row["kept"] / row["total"] if row["total"] else 0 for row in panels[kind]]
            bars = range(len(shares))
            place.barh(bars, 1, height=0.7, color=theme.grid, linewidth=0)
            # The bar of one unit among many is still visible.
            visible = [share and max(share, 0.01) for share in shares]
            place.barh(bars, visible, height=0.7, color=colour, linewidth=0)
            place.set(xlim=(0, 1), ylim=(most - 0.5, -0.6))
            _count_beside(place, counts[kind], theme)
        return figure

    save(draw, path)


def kept_units(report: Report) -> Plot | None:
    """Plot which units are kept, layer by layer: one map for each kind."""
    if not report.units:
        return None
    panels = _panels(report.units)

    def draw(theme: Theme) -> Figure:
        figure, axes = stacked_axes([len(rows) for rows in panels.values()])
        colours = _colours((kind for _, kind in panels), theme)
        for one, ((stage, kind), rows) in zip(axes, panels.items(), strict=True):
            labels, pattern = short_names([row["path"] for row in rows])
            label_rows(one, labels, f"{_title(panels, stage, kind)}{pattern}")
            kept, totals = [row["kept"] for row in rows], [row["total"] for row in rows]
            few = max(totals) * len(rows) <= FEW
            (_draw_squares if few else _draw_bands)(one, kept, colours[kind], theme)
            counts = [f"{_count(row):,} of {row['total']:,}" for row in rows]
            _count_beside(one, counts, theme)
        return figure

    rows = [
        (stage, row["path"], kind, f"{_count(row):,}", f"{row['total']:,}")
        for (stage, kind), lines in panels.items()
        for row in lines
    ]
    table = Section(
        "Kept", ("stage", "layer", "units", "kept", "of"), rows, code=(1,), right=(3, 4)
    )
    counts = [_summary(kind, rows) for (_, kind), rows in panels.items()]
    alt = (
        "Maps with a row for each layer and its units from left to right; filled is kept, hollow "
        f"or pale is removed. {' '.join(counts)}"
    )
    return Plot("structure", f"Kept units{of_seed(report)}", alt, draw, table)


def importance(report: Report) -> Plot | None:
    """Plot the importance of each unit at the time of the cut: one heat map for each kind."""
    scored = [row for row in report.units if row.get("importance")]
    if not scored:
        return None
    panels = _panels(scored)
    maps = [
        importance_map(_title(panels, *key), {row["path"]: row["importance"] for row in rows})
        for key, rows in panels.items()
    ]
    rows = []
    for (stage, kind), lines in panels.items():
        sums = [_whole(row) for row in lines]
        for row, own in zip(lines, sums, strict=True):
            share = f"{own / sum(sums):.1%}" if sum(sums) else "-"
            rows.append((stage, row["path"], kind, share, f"{max(row['importance']):.3g}"))
    headings = ("stage", "layer", "units", "share of all", "greatest")
    table = Section("Importance", headings, rows, code=(1,), right=(3, 4))
    top = [
        f"The most important {kind} are those of "
        f"{max(lines, key=lambda row: sum(row['importance']))['path']}."
        for (_, kind), lines in panels.items()
        if len(lines) > 1
    ]
    alt = (
        "Heat maps with a row for each layer and its units from left to right, from dark for "
        f"unimportant to bright for the most important of the kind. {' '.join(top)}"
    )
    title = f"Importance of units{of_seed(report)}"
    return Plot("importance", title, alt, lambda _: heat_map_figure(maps), table)


def _colours(kinds: Iterable[str], theme: Theme) -> dict[str, str]:
    different = dict.fromkeys(kinds)
    return {kind: theme.series[place % 4] for place, kind in enumerate(different)}


def _panels(units: Rows) -> dict[tuple[str, str], Rows]:
    """Return the rows of each stage and kind, in the order of the layers."""
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {
        (row["stage"], row["kind"]): [] for row in units
    }
    for row in sorted(units, key=lambda row: natural_key(row["path"])):
        panels[row["stage"], row["kind"]].append(row)
    return {**panels}


def _share(row: Mapping[str, Any]) -> float:
    return float(np.mean(row["kept"])) if row["kept"] else 0.0


def _count(row: Mapping[str, Any]) -> int:
    return round(_share(row) * row["total"])


def _whole(row: Mapping[str, Any]) -> float:
    """Return the sum of the importance of a layer's units, whose cells are means."""
    return sum(row["importance"]) * row["total"] / len(row["importance"])


def _summary(kind: str, rows: Rows) -> str:
    kept = round(sum(_share(row) * row["total"] for row in rows))
    total = sum(row["total"] for row in rows)
    least = min(rows, key=_share)
    where = f", fewest in {least['path']} ({_share(least):.0%})" if len(rows) > 1 else ""
    return f"{kept:,} of {total:,} {kind} are kept{where}."


def _title(panels: Panels, stage: str, kind: str) -> str:
    return f"{stage}: {kind}" if len({stage for stage, _ in panels}) > 1 else kind


def _count_beside(axes: Any, counts: Sequence[str], theme: Theme) -> None:
    for row, count in enumerate(counts):
        axes.annotate(
            count,
            (1.02, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=6.5,
            color=theme.muted,
        )


def _draw_squares(axes: Any, kept: Sequence[Sequence[float]], colour: str, theme: Theme) -> None:
    for full in (False, True):
        found = [
            (x, y) for y, row in enumerate(kept) for x, v in enumerate(row) if (v > 0.5) is full
        ]
        if found:
            axes.scatter(
                *zip(*found, strict=True),
                marker="s",
                s=36,
                facecolors=colour if full else "none",
                edgecolors=colour if full else theme.muted,
                linewidths=0.7,
            )
    axes.set_xlim(-0.6, max(map(len, kept)) - 0.4)


def _draw_bands(axes: Any, kept: Sequence[Sequence[float]], colour: str, theme: Theme) -> None:
    """Draw the kept share of neighbours as a height within each row's pale band."""
    for line, row in enumerate(kept):
        edges = np.linspace(0, 1, len(row) + 1)
        axes.barh(line, 1, height=0.8, color=theme.grid, linewidth=0)
        top = line + 0.4
        axes.stairs(top - 0.8 * np.asarray(row), edges, baseline=top, fill=True, color=colour)
    axes.set_xlim(0, 1)
