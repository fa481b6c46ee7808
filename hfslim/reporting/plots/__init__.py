"""The figures of a report, drawn by matplotlib, which is imported when something is drawn."""

from __future__ import annotations

from hfslim.reporting.plots.classes import class_changes, confusion, teacher_agreement
from hfslim.reporting.plots.course import speed_cost, training_course
from hfslim.reporting.plots.maps import importance, kept_units
from hfslim.reporting.plots.style import Plot
from hfslim.reporting.report import Report

__all__ = ["plots_of"]

ALL = (
    *(speed_cost, kept_units, class_changes, teacher_agreement),
    *(confusion, training_course, importance),
)


def plots_of(report: Report) -> list[Plot]:
    """Return the figures for which a report has the numbers, in the order of the page."""
    return [plot for make in ALL if (plot := make(report)) is not None]
