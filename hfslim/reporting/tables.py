"""The tables of a report, on the screen and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hfslim.measuring.class_answers import ClassLine, decimals
from hfslim.measuring.measurement import Comparison
from hfslim.measuring.timing import Latency
from hfslim.reporting.layer_names import natural_key

__all__ = [
    *("NOT_MEASURED", "FigureRow", "Section", "class_table", "cost_rows", "formatted"),
    *("kept_rows", "markdown_table", "measurement_conditions"),
]

BAR_WIDTH = 24
NOT_MEASURED = "not measured"
SIZES = {
    "parameters": "parameters",
    "parameters without embeddings": "parameters_without_embeddings",
    "bytes of weights": "bytes",
}
COSTS = (*SIZES, "MACs", "p50 ms", "p95 ms", "examples/s")


class FigureRow(NamedTuple):
    """A row of the table of figures: name, value before, value after, change."""

    figure: str
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class Section:
    """A table under a title.

    Attributes:
        title: The title above.
        headings: One for each column.
        rows: Cells as text.
        notes: Lines below the table.
        code: Columns set as code in Markdown.
        right: Columns set flush right on the screen.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    code: Sequence[int] = ()
    right: Sequence[int] = ()

    def print(self, console: Console) -> None:
        """Print the table and its notes on the screen."""
        table = Table(title=escape(self.title), title_justify="left")
        for column, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if column in self.right else "left")
        for row in self.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for note in self.notes:
            console.print(note, markup=False)

    def to_markdown(self, level: int = 2) -> str:
        """Return the table as Markdown, under a heading of a level."""
        rows = [
            [f"`{cell}`" if i in self.code else cell for i, cell in enumerate(row)]
            for row in self.rows
        ]
        title = f"{'#' * level} {self.title}"
        return "\n\n".join([title, markdown_table(self.headings, rows), *self.notes])


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in x) + " |" for x in lines)


def formatted(
    value: float | None, after: str = "", sign: str = "", examples: int | None = None
) -> str:
    """Return a figure, as exact as so many examples make it, or `not measured`."""
    return NOT_MEASURED if value is None else f"{value:{sign}z.{decimals(examples)}f}{after}"


def cost_rows(comparisons: Sequence[Comparison]) -> list[FigureRow]:
    """Return the rows of parameters, bytes, multiply-accumulates and times."""
    if not comparisons:
        return [FigureRow(figure, NOT_MEASURED, NOT_MEASURED, "-") for figure in COSTS]
    before, after = comparisons[0].before, comparisons[0].after
    rows = [_count(name, getattr(before, at), getattr(after, at)) for name, at in SIZES.items()]
    for c in comparisons:
        at = f"batch {c.after.latency.batch_size}"
        old, new = c.before.latency, c.after.latency
        faster = f"speedup {c.speedup:.2f}x ({c.low:.2f} to {c.high:.2f})"
        rate = (old.throughput, new.throughput)
        rows += [
            _count(f"MACs, {at}", c.before.macs, c.after.macs),
            FigureRow(f"p50 ms, {at}", f"{old.p50_ms:.2f}", f"{new.p50_ms:.2f}", faster),
            _times(f"p95 ms, {at}", ".2f", old.p95_ms, new.p95_ms, old.p95_ms / new.p95_ms),
            _times(f"examples/s, {at}", ",.1f", *rate, rate[1] / rate[0]),
        ]
    return rows


def measurement_conditions(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the input, device, dtype, threads and calls of each measurement."""
    lines = []
    for c in comparisons:
        time = _before_and_after(_stated(c.before.latency), _stated(c.after.latency))
        lines.append(
            f"Batch {c.after.latency.batch_size}: "
            f"{_before_and_after(c.before.inputs, c.after.inputs)}; {time}; "
            f"{c.after.latency.calls} calls of each in turn; "
            "speedup of the median with its 95 % interval."
        )
    return lines


def kept_rows(structure: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Return layer, kind of unit, a bar and the numbers kept and before, layer by layer."""
    return [
        (
            row["path"],
            row["kind"],
            _bar(row["kept"], row["total"]),
            f"{row['kept']:,} / {row['total']:,}",
        )
        for row in sorted(structure, key=lambda row: natural_key(row["path"]))
    ]


def class_table(lines: Sequence[ClassLine], notes: Sequence[str] = ()) -> Section:
    """Return the share of each class's examples that is answered right, before and after."""
    rows = [
        (
            line.name,
            f"{line.examples:,}",
            formatted(line.teacher, examples=line.examples),
            formatted(line.model, examples=line.examples),
            "-" if line.change is None else formatted(line.change, "", "+", line.examples),
        )
        for line in lines
    ]
    headings = ("class", "examples", "right before", "right after", "change")
    return Section("Class by class", headings, rows, notes, right=(1, 2, 3, 4))


def _count(figure: str, before: int, after: int) -> FigureRow:
    change = f"{after / before:.1%} kept" if before else "-"
    return FigureRow(figure, f"{before:,}", f"{after:,}", change)


def _times(figure: str, form: str, before: float, after: float, faster: float) -> FigureRow:
    return FigureRow(figure, f"{before:{form}}", f"{after:{form}}", f"{faster:.2f}x")


def _stated(time: Latency) -> str:
    return f"{time.device}, {time.dtype}, {time.threads} threads"


def _before_and_after(before: str, after: str) -> str:
    return after if before == after else f"before {before}; after {after}"


def _bar(kept: int, total: int) -> str:
    # Rounding must neither hide the last kept unit nor the only removed one.
    filled = round(BAR_WIDTH * kept / total) if total else 0
    if 0 < kept < total:
        filled = min(max(filled, 1), BAR_WIDTH - 1)
    return "█" * filled + "░" * (BAR_WIDTH - filled)
