"""Figures of the answers: confusion, change by class, agreement with the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hfslim.measuring.class_answers import ClassAnswers, ClassLine
from hfslim.reporting.plots.style import BLUE, HATCHES, ORANGE, Plot, Theme, new_figure
from hfslim.reporting.report import Report
from hfslim.reporting.tables import Section, class_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERED = 12
"""The number of classes up to which the cells of a confusion matrix hold their counts."""
SHOWN = 30
"""The number of classes that have bars, those that lost most."""


def confusion(report: Report) -> Plot | None:
    """Plot the confusion matrix."""
    answers = report.answers
    if answers is None or answers.confusion is None:
        return None
    counts, names = np.asarray(answers.confusion), answers.classes

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = new_figure(3.5)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        (_draw_counts if len(names) <= NUMBERED else _draw_shares)(axes, counts, shares, theme)
        step = max(1, len(names) // 24)
        labels = [_short(name) for name in names]
        turned = {"rotation": 60, "ha": "right"} if max(map(len, labels)) > 2 else {}
        axes.set_xticks(range(0, len(names), step), labels[::step], fontsize=6.5, **turned)
        axes.set_yticks(range(0, len(names), step), labels[::step], fontsize=6.5)
        axes.set(
            xlim=(-0.5, len(names) - 0.5),
            ylim=(len(names) - 0.5, -0.5),
            xlabel="answered",
            ylabel="true class",
            aspect="equal",
        )
        axes.grid(False)
        return figure

    found = [(int(n), t, a) for (t, a), n in np.ndenumerate(counts) if n and t != a]
    found.sort(key=lambda x: -x[0])
    before = answers.teacher_confusion
    rows = [
        (names[t], names[a], f"{n:,}", "-" if before is None else f"{before[t][a]:,}")
        for n, t, a in found[:SHOWN]
    ]
    headings = ("true class", "answered", "model", "teacher")
    note = f"The {SHOWN} most frequent of {len(found)} confusions." if len(found) > SHOWN else ""
    table = Section("Confusions", headings, rows, [note] if note else [], right=(2, 3))
    most = "; ".join(f"{names[t]} for {names[a]}, {n}" for n, t, a in found[:3])
    alt = (
        f"Confusion matrix, true classes down, answers across: {int(np.trace(counts)):,} of "
        f"{counts.sum():,} are on the diagonal. "
        f"Most frequent: {'true ' + most if most else 'no confusion'}."
    )
    return Plot("confusion", "Confusion matrix", alt, draw, table)


def class_changes(report: Report) -> Plot | None:
    """Plot what each class lost or gained against the teacher."""
    answers = report.answers
    if answers is None or not answers.has_teacher:
        return None
    lines = _shown(answers)

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = new_figure(0.55 + 0.17 * len(lines))
        for place, line in enumerate(lines):
            change = 100 * (line.change or 0.0)
            lost = change < 0
            _bar(axes, place, change, theme, theme.series[int(lost)], HATCHES[int(lost)])
            axes.annotate(
                f"{change:+.1f}" + (" !" if line.significant else ""),
                (change, place),
                xytext=(-3 if lost else 3, 0),
                textcoords="offset points",
                ha="right" if lost else "left",
                va="center",
                fontsize=6.5,
            )
        _label_classes(axes, lines)
        axes.axvline(0, color=theme.muted, linewidth=0.8)
        axes.margins(x=0.25)
        axes.set_xlabel(
            "change of the share that is right, in points\n(! more than chance explains)"
        )
        return figure

    worst, best = lines[0], lines[-1]
    alt = (
        f"Bars of how the share of right answers changed for each of {len(lines)} classes, worst "
        f"first: {worst.name} {100 * (worst.change or 0.0):+.1f} points, {best.name} "
        f"{100 * (best.change or 0.0):+.1f} points."
    )
    return Plot("changes", "Change of each class", alt, draw, class_table(answers.lines()))


def teacher_agreement(report: Report) -> Plot | None:
    """Plot for each class how many examples both models, one or neither answers right."""
    answers = report.answers
    if answers is None or not answers.has_teacher:
        return None
    parts = ("both right", "only the teacher", "only the model", "both wrong")
    by_name = dict(zip(answers.classes, answers.right, strict=True))
    lines = _shown(answers)

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = new_figure(0.75 + 0.17 * len(lines))
        colours = (*theme.series[:3], theme.grid)
        for place, line in enumerate(lines):
            left = 0.0
            for part, count in enumerate(by_name[line.name]):
                share = 100 * count / line.examples
                label = parts[part] if place == 0 else None
                how = {"left": left, "label": label}
                _bar(axes, place, share, theme, colours[part], HATCHES[part], **how)
                left += share
        _label_classes(axes, lines)
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of the class's examples")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
        return figure

    rows = [
        (name, *(f"{count:,}" for count in counts))
        for name, counts in by_name.items()
        if sum(counts)
    ]
    table = Section("Agreement", ("class", *parts), rows, right=(1, 2, 3, 4))
    sums = np.asarray(answers.right).sum(0)
    totals = ", ".join(f"{part} {count:,}" for part, count in zip(parts, sums, strict=True))
    alt = (
        f"Stacked bars for each class. In all: {totals}. The two answer {answers.churn:.1%} of the "
        "examples differently."
    )
    return Plot("agreement", "Agreement with the teacher", alt, draw, table)


def _shown(answers: ClassAnswers) -> list[ClassLine]:
    """Return the classes that have bars, the greatest loss first."""
    return sorted(answers.lines(), key=lambda line: line.change or 0.0)[:SHOWN]


def _bar(
    axes: Any, place: int, width: float, theme: Theme, colour: str, hatch: str, **how: Any
) -> None:
    edge = {"edgecolor": theme.ink, "linewidth": 0.4}
    axes.barh(place, width, height=0.72, color=colour, hatch=hatch, **edge, **how)


def _label_classes(axes: Any, lines: list[ClassLine]) -> None:
    axes.set_yticks(range(len(lines)), [_short(line.name) for line in lines], fontsize=7)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def _short(name: str, most: int = 16) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _draw_counts(axes: Any, counts: np.ndarray, shares: np.ndarray, theme: Theme) -> None:
    """Draw each cell as a rectangle of the page's colours, with its count."""
    from matplotlib.patches import Rectangle

    for (true, answered), count in np.ndenumerate(counts):
        share = float(shares[true, answered])
        cell = {"facecolor": theme.series[int(true != answered)], "alpha": share**0.5}
        axes.add_patch(Rectangle((answered - 0.5, true - 0.5), 1, 1, linewidth=0, **cell))
        if count:
            colour = theme.on_series if share > 0.5 else theme.ink
            middle = {"ha": "center", "va": "center"}
            axes.text(answered, true, f"{count:,}", fontsize=7, color=colour, **middle)


def _draw_shares(axes: Any, counts: np.ndarray, shares: np.ndarray, theme: Theme) -> None:
    """Draw all cells as one image, whose colours are the same in every theme."""
    from matplotlib.colors import to_rgba

    image = np.zeros((*counts.shape, 4))
    image[...] = to_rgba(ORANGE)
    image[np.eye(len(counts), dtype=bool)] = to_rgba(BLUE)
    image[..., 3] = np.sqrt(shares)
    axes.imshow(image, interpolation="nearest")
