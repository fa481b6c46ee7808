"""Figures of what a model answers: confusion, what each class lost, agreement with the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hfslim.measuring.class_answers import ClassAnswers, ClassLine
from hfslim.reporting.plots.style import BLUE, HATCHES, ORANGE, Plot, Theme, new_figure
from hfslim.reporting.report import Report
from hfslim.reporting.tables import Section, by_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERED = 12
"""Classes up to which the cells of a confusion matrix hold their counts."""
SHOWN = 30
"""Classes up to which bars are drawn for each; beyond, those that fare worst."""


def confusion(report: Report) -> Plot | None:
    """Draw which class is taken for which."""
    answers = report.answers
    if answers is None or answers.confusion is None:
        return None
    counts, names = np.asarray(answers.confusion), answers.classes

    def draw(theme: Theme) -> Figure:
        from matplotlib.colors import to_rgba

        figure, (axes,) = new_figure(3.5)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        if len(names) <= NUMBERED:
            for true, row in enumerate(counts):
                for said, count in enumerate(row):
                    share = float(shares[true, said])
                    place = (said - 0.5, true - 0.5)
                    axes.add_patch(_cell(place, theme.series[0 if true == said else 1], share))
                    if count:
                        colour = theme.on_series if share > 0.5 else theme.ink
                        axes.text(
                            said,
                            true,
                            f"{count:,}",
                            ha="center",
                            va="center",
                            fontsize=7,
                            color=colour,
                        )
        else:
            image = np.zeros((*counts.shape, 4))
            image[...] = to_rgba(ORANGE)
            image[np.eye(len(names), dtype=bool)] = to_rgba(BLUE)
            image[..., 3] = np.sqrt(shares)
            axes.imshow(image, interpolation="nearest")
        step = max(1, len(names) // 24)
        labels = [_short(name) for name in names]
        turned = {"rotation": 60, "ha": "right"} if max(map(len, labels)) > 2 else {}
        axes.set_xticks(range(0, len(names), step), labels[::step], fontsize=6.5, **turned)
        axes.set_yticks(range(0, len(names), step), labels[::step], fontsize=6.5)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.grid(False)
        axes.set_xlabel("answered")
        axes.set_ylabel("true class")
        return figure

    taken = sorted(
        ((int(n), t, s) for (t, s), n in np.ndenumerate(counts) if n and t != s),
        key=lambda x: -x[0],
    )
    before = answers.teacher_confusion
    rows = [
        (names[t], names[s], f"{n:,}", "-" if before is None else f"{before[t][s]:,}")
        for n, t, s in taken[:SHOWN]
    ]
    headings = ("true class", "answered", "model", "teacher")
    note = f"The {SHOWN} most frequent of {len(taken)} confusions." if len(taken) > SHOWN else ""
    table = Section("Confusions", headings, rows, [note] if note else [], right=(2, 3))
    right = int(np.trace(counts))
    most = "; ".join(f"{names[t]} for {names[s]}, {n}" for n, t, s in taken[:3])
    alt = (
        f"Confusion matrix, true classes down, answers across: {right:,} of {counts.sum():,} are "
        f"on the diagonal. Most frequent: {'true ' + most if most else 'no confusion'}."
    )
    return Plot("confusion", "What is taken for what", alt, draw, table)


def changes(report: Report) -> Plot | None:
    """Draw what each class lost or won against the teacher."""
    answers = report.answers
    if answers is None or not answers.has_teacher:
        return None
    lines = _shown(answers)

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = new_figure(0.55 + 0.17 * len(lines))
        for place, line in enumerate(lines):
            change = 100 * (line.change or 0.0)
            axes.barh(
                place,
                change,
                height=0.7,
                color=theme.series[1 if change < 0 else 0],
                edgecolor=theme.ink,
                linewidth=0.4,
                hatch=HATCHES[1] if change < 0 else "",
            )
            told = f"{change:+.1f}" + (" !" if line.significant else "")
            side = -3 if change < 0 else 3
            axes.annotate(
                told,
                (change, place),
                xytext=(side, 0),
                textcoords="offset points",
                ha="right" if change < 0 else "left",
                va="center",
                fontsize=6.5,
            )
        _bars(axes, lines)
        axes.axvline(0, color=theme.muted, linewidth=0.8)
        axes.margins(x=0.25)
        axes.set_xlabel(
            "change of the share that is right, in points\n(! more than chance explains)"
        )
        return figure

    worst = lines[0]
    alt = (
        f"Bars of how the share of right answers changed for each of {len(lines)} classes, worst "
        f"first: {worst.name} {100 * (worst.change or 0.0):+.1f} points, {lines[-1].name} "
        f"{100 * (lines[-1].change or 0.0):+.1f} points."
    )
    return Plot("changes", "What each class lost", alt, draw, by_class(answers.lines()))


def agreement(report: Report) -> Plot | None:
    """Draw for each class how many examples both models, one or neither answers right."""
    answers = report.answers
    if answers is None or not answers.has_teacher:
        return None
    parts = ("both right", "only the teacher", "only the model", "both wrong")
    by_name = dict(zip(answers.classes, answers.right, strict=True))
    lines = _shown(answers)

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = new_figure(0.75 + 0.17 * len(lines))
        colours = (theme.series[0], theme.series[1], theme.series[2], theme.grid)
        for place, line in enumerate(lines):
            left = 0.0
            for part, count in enumerate(by_name[line.name]):
                share = 100 * count / line.examples
                axes.barh(
                    place,
                    share,
                    left=left,
                    height=0.75,
                    color=colours[part],
                    edgecolor=theme.ink,
                    linewidth=0.3,
                    hatch=HATCHES[part],
                    label=parts[part] if place == 0 else None,
                )
                left += share
        _bars(axes, lines)
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
    told = ", ".join(f"{part} {count:,}" for part, count in zip(parts, sums, strict=True))
    alt = (
        f"Stacked bars for each class. In all: {told}. The two answer {answers.churn:.1%} of the "
        "examples differently."
    )
    return Plot("agreement", "Agreement with the teacher", alt, draw, table)


def _shown(answers: ClassAnswers) -> list[ClassLine]:
    """Return the classes, worst first, as many as there is room for."""
    return sorted(answers.lines(), key=lambda line: line.change or 0.0)[:SHOWN]


def _bars(axes: object, lines: list[ClassLine]) -> None:
    axes.set_yticks(range(len(lines)), [_short(line.name) for line in lines], fontsize=7)  # type: ignore[attr-defined]
    axes.set_ylim(len(lines) - 0.4, -0.6)  # type: ignore[attr-defined]
    axes.grid(axis="y", visible=False)  # type: ignore[attr-defined]


def _short(name: str, most: int = 16) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _cell(place: tuple[float, float], colour: str, share: float) -> object:
    from matplotlib.patches import Rectangle

    return Rectangle(place, 1, 1, facecolor=colour, alpha=share**0.5, linewidth=0)
