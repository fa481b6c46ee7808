"""What a report is on, and what came out, in a sentence each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfslim.reporting.report import Quality, Report

__all__ = ["title", "verdict"]


def title(report: Report) -> str:
    """Return what the report is on, as a person would name it."""
    # A Hub id has one slash; of a path the last part is the name.
    named = report.model.count("/") == 1 and report.model[0] not in "./"
    name = report.model if named else report.model.rstrip("/").rpartition("/")[2]
    costs = _costs(report)
    if costs is None:
        return f"{name}, pruned" if report.structure else name
    cut = "cut to {:.0%} of its" if report.structure else "{:.0%} of the teacher's"
    return f"{name}, {cut.format(costs[0])} operations"


def verdict(report: Report) -> str:
    """Return one sentence on cost, speed and quality; empty if nothing was measured."""
    parts, costs = [], _costs(report)
    if costs is not None:
        last = report.comparisons[-1]
        same = not report.stability and last.low <= 1 <= last.high
        fast = "as fast as before" if same else f"{costs[1]:.2f} times as fast"
        parts.append(f"{costs[0]:.1%} of the operations are left")
        parts.append(f"it is {fast} at batch {last.after.latency.batch_size}")
    parts += [_quality(report, one) for one in report.quality[:1]]
    if not parts:
        return ""
    *others, last_part = parts
    text = f"{', '.join(others)}, and {last_part}." if others else f"{last_part}."
    return text[0].upper() + text[1:]


def _quality(report: Report, quality: Quality) -> str:
    teacher, value, _ = quality.cells()
    if quality.teacher is None or not math.isfinite(quality.value):
        return f"the {quality.metric} is {value}"
    other = f"where it was {teacher}" if report.structure else f"that of the teacher {teacher}"
    text = f"the {quality.metric} is {value}, {other}"
    answers = report.answers
    if quality.metric == "accuracy" and answers and answers.confusion and answers.has_teacher:
        text += f" ({'no ' * answers.chance_explains()}more than chance explains)"
    return text


def _costs(report: Report) -> tuple[float, float] | None:
    """Return the fraction of operations and the speedup of the last batch size, or None."""
    if not report.comparisons or not report.comparisons[-1].before.macs:
        return None
    last = report.comparisons[-1]
    at, over = f"batch {last.after.latency.batch_size}", {s.figure: s for s in report.stability}
    kept, speedup = over.get(f"MACs kept, {at}"), over.get(f"speedup, {at}")
    return (
        kept.mean if kept else last.after.macs / last.before.macs,
        speedup.mean if speedup else last.speedup,
    )
