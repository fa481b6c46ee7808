"""The figures of a report, drawn by matplotlib."""

from __future__ import annotations

from hfslim.reporting.plots.classes import agreement, changes, confusion
from hfslim.reporting.plots.course import course, curve
from hfslim.reporting.plots.maps import importance, structure
from hfslim.reporting.plots.seeds import seeds
from hfslim.reporting.plots.style import Plot, check_matplotlib, to_png, to_svg
from hfslim.reporting.report import Report

__all__ = ["Plot", "check_matplotlib", "plots", "to_png", "to_svg"]

ALL = (seeds, curve, structure, changes, agreement, confusion, course, importance)


def plots(report: Report) -> list[Plot]:
    """Return those figures that a report has the numbers for, in the order of a page."""
    return [plot for make in ALL if (plot := make(report)) is not None]
