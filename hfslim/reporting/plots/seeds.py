"""The figure over several seeds: the value of each run, and the mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hfslim.reporting.plots.style import MARKS, Plot, Theme, new_figure
from hfslim.reporting.report import Report
from hfslim.reporting.tables import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def seed_values(report: Report) -> Plot | None:
    """Plot each figure's values by seed, on axes of its own."""
    shown = [one for one in report.stability if not one.figure.startswith("MACs")]
    if not shown:
        return None
    numbers = shown[0].seeds

    def draw(theme: Theme) -> Figure:
        figure, axes = new_figure(0.5 + 0.58 * len(shown), len(shown))
        # Marks are stacked, so that equal values do not hide each other.
        heights = np.linspace(0.5, -0.5, len(numbers))
        for place, one in zip(axes, shown, strict=True):
            for number, (seed, value) in enumerate(zip(one.seeds, one.values, strict=True)):
                mark, colour = MARKS[number % len(MARKS)], theme.series[number % 4]
                style = {"marker": mark, "markersize": 5, "color": colour, "linestyle": ""}
                place.plot(value, heights[number], label=str(seed), **style)
            place.axvline(one.mean, color=theme.ink, linewidth=1)
            good = "more is better" if one.better == "high" else "less is better"
            place.set_title(f"{one.figure} ({good})", fontsize=7.5)
            place.set(yticks=[], ylim=(-1, 1))
            place.margins(x=0.1)
            place.spines["left"].set_visible(False)
            place.locator_params(axis="x", nbins=4)
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=6, title="seed (line: mean)")
        return figure

    headings = ("", "mean", "spread", "worst", "seed of it", *map(str, numbers))
    rows = [(*one.cells(), *(f"{value:.4f}" for value in one.values)) for one in report.stability]
    table = Section("Seeds", headings, rows, right=tuple(range(1, len(headings))))
    first = shown[0]
    alt = (
        f"A row for each figure with a mark for each of {len(numbers)} seeds: {first.figure} is "
        f"{first.mean:.4f} on average, worst {first.worst:.4f} with seed {first.worst_seed}."
    )
    return Plot("seeds", "Values by seed", alt, draw, table)
