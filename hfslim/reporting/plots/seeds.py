"""Figures over several seeds: each run's value, and their mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hfslim.reporting.plots.style import MARKS, Plot, Theme, new_figure
from hfslim.reporting.report import Report
from hfslim.reporting.tables import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hfslim.reporting.seed_statistics import Spread


def seeds(report: Report) -> Plot | None:
    """Draw each figure's values by seed; those that share a unit share a line of axes."""
    spreads = [one for one in report.stability if not one.figure.startswith("MACs")]
    if not spreads:
        return None
    numbers = spreads[0].seeds

    def draw(theme: Theme) -> Figure:
        figure, axes = new_figure(0.5 + 0.58 * len(spreads), len(spreads))
        for one, spread in zip(axes, spreads, strict=True):
            # One below the other, so that equal values do not hide each other.
            heights = np.linspace(0.5, -0.5, len(numbers))
            for place, (seed, value) in enumerate(zip(spread.seeds, spread.values, strict=True)):
                mark = MARKS[place % len(MARKS)]
                one.plot(
                    value,
                    heights[place],
                    marker=mark,
                    color=theme.series[place % 4],
                    markersize=5,
                    linestyle="",
                    label=str(seed),
                )
            one.axvline(spread.mean, color=theme.ink, linewidth=1)
            one.set_title(_title(spread), fontsize=7.5)
            one.set_yticks([])
            one.set_ylim(-1, 1)
            one.margins(x=0.1)
            one.spines["left"].set_visible(False)
            one.locator_params(axis="x", nbins=4)
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=6, title="seed (line: mean)")
        return figure

    headings = ("", "mean", "spread", "worst", "seed of it", *map(str, numbers))
    rows = [(*one.cells(), *(f"{value:.4f}" for value in one.values)) for one in report.stability]
    table = Section("Seeds", headings, rows, right=tuple(range(1, len(headings))))
    first = spreads[0]
    alt = (
        f"A line for each figure with a mark for each of {len(numbers)} seeds: {first.figure} is "
        f"{first.mean:.4f} on average, worst {first.worst:.4f} with seed {first.worst_seed}."
    )
    return Plot("seeds", "Over the seeds", alt, draw, table)


def _title(spread: Spread) -> str:
    good = "more is better" if spread.better == "high" else "less is better"
    return f"{spread.figure} ({good})"
