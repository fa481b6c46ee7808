"""The figures of a report, drawn by matplotlib."""

from __future__ import annotations

from hfslim.plots.classes import agreement, changes, confusion
from hfslim.plots.course import course, curve
from hfslim.plots.maps import importance, structure
from hfslim.plots.seeds import seeds
from hfslim.plots.style import Plot, check_matplotlib, to_png, to_svg
from hfslim.report import Report

__all__ = ["Plot", "check_matplotlib", "plots", "to_png", "to_svg"]

ALL = (seeds, curve, structure, changes, agreement, confusion, course, importance)


def plots(report: Report) -> list[Plot]:
    """Return those figures that a report has the numbers for, in the order of a page."""
    return [plot for make in ALL if (plot := make(report)) is not None]
