"""Tables of a report: their rows, on the screen and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hfslim.measuring.class_answers import ClassLine
from hfslim.measuring.measurement import Comparison
from hfslim.measuring.timing import Latency
from hfslim.reporting.picture import natural

__all__ = [
    "NOT_MEASURED",
    "Row",
    "Section",
    "by_class",
    "costs",
    "kept",
    "markdown_table",
    "number",
]

BAR_WIDTH = 24
NOT_MEASURED = "not measured"
COSTS = (
    "parameters",
    "parameters without embeddings",
    "bytes of weights",
    "MACs",
    "p50 ms",
    "p95 ms",
    "examples/s",
)


class Row(NamedTuple):
    """A line of the table of figures: what it is, before, after, and how they relate."""

    figure: str
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class Section:
    """A table under a title.

    Attributes:
        title: What stands above.
        headings: One for each column.
        rows: Cells as text.
        notes: Lines below the table.
        code: Columns that are set as code in Markdown.
        right: Columns that are flush right on the screen.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    code: Sequence[int] = ()
    right: Sequence[int] = ()

    def print(self, console: Console) -> None:
        """Show it on the screen."""
        table = Table(title=escape(self.title), title_justify="left")
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number in self.right else "left")
        for row in self.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for note in self.notes:
            console.print(note, markup=False)

    def to_markdown(self, level: int = 2) -> str:
        """Return it as Markdown, under a heading of a level."""
        rows = [
            [f"`{cell}`" if i in self.code else cell for i, cell in enumerate(row)]
            for row in self.rows
        ]
        title = f"{'#' * level} {self.title}"
        return "\n\n".join([title, markdown_table(self.headings, rows), *self.notes])


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows as a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in x) + " |" for x in lines)


def number(value: float | None, after: str = "", sign: str = "") -> str:
    """Write a figure with four decimals."""
    return NOT_MEASURED if value is None else f"{value:{sign}z.4f}{after}"


def costs(comparisons: Sequence[Comparison]) -> list[Row]:
    """Return the lines of parameters, bytes, multiply-accumulates and times."""
    if not comparisons:
        return [Row(figure, NOT_MEASURED, NOT_MEASURED, "-") for figure in COSTS]
    before, after = comparisons[0].before, comparisons[0].after
    rows = [
        _count("parameters", before.parameters, after.parameters),
        _count(
            "parameters without embeddings",
            before.parameters_without_embeddings,
            after.parameters_without_embeddings,
        ),
        _count("bytes of weights", before.bytes, after.bytes),
    ]
    for c in comparisons:
        at = f"batch {c.after.latency.batch_size}"
        rows.append(_count(f"MACs, {at}", c.before.macs, c.after.macs))
        rows += _times(at, c)
    return rows


def conditions(comparisons: Sequence[Comparison]) -> list[str]:
    """Return what each measurement holds for: input, device, dtype, threads, calls."""
    lines = []
    for c in comparisons:
        before, after = _stated(c.before.latency), _stated(c.after.latency)
        stated = after if before == after else f"before {before}; after {after}"
        inputs = c.after.inputs
        if c.before.inputs != inputs:
            inputs = f"before {c.before.inputs}; after {inputs}"
        lines.append(
            f"Batch {c.after.latency.batch_size}: {inputs}; {stated}; "
            f"{c.after.latency.calls} calls of each in turn; "
            "speedup of the median with its 95 % interval."
        )
    return lines


def kept(structure: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Return layer, kind of unit, a bar and the numbers kept and before, layer by layer."""
    return [
        (
            row["path"],
            row["kind"],
            _bar(row["kept"], row["total"]),
            f"{row['kept']:,} / {row['total']:,}",
        )
        for row in sorted(structure, key=lambda row: natural(row["path"]))
    ]


def by_class(lines: Sequence[ClassLine], notes: Sequence[str] = ()) -> Section:
    """Return classes and the share of each one's examples that is answered right."""
    rows = [
        (
            line.name,
            f"{line.examples:,}",
            number(line.teacher),
            number(line.model),
            "-" if line.change is None else number(line.change, sign="+"),
        )
        for line in lines
    ]
    headings = ("class", "examples", "right before", "right after", "change")
    return Section("Class by class", headings, rows, notes, right=(1, 2, 3, 4))


def _count(figure: str, before: int, after: int) -> Row:
    change = f"{after / before:.1%} kept" if before else "-"
    return Row(figure, f"{before:,}", f"{after:,}", change)


def _times(at: str, comparison: Comparison) -> list[Row]:
    before, after = comparison.before.latency, comparison.after.latency
    faster = f"speedup {comparison.speedup:.2f}x ({comparison.low:.2f} to {comparison.high:.2f})"
    return [
        Row(f"p50 ms, {at}", f"{before.p50_ms:.2f}", f"{after.p50_ms:.2f}", faster),
        Row(
            f"p95 ms, {at}",
            f"{before.p95_ms:.2f}",
            f"{after.p95_ms:.2f}",
            f"{before.p95_ms / after.p95_ms:.2f}x",
        ),
        Row(
            f"examples/s, {at}",
            f"{before.throughput:,.1f}",
            f"{after.throughput:,.1f}",
            f"{after.throughput / before.throughput:.2f}x",
        ),
    ]


def _stated(time: Latency) -> str:
    return f"{time.device}, {time.dtype}, {time.threads} threads"


def _bar(kept: int, total: int) -> str:
    # Neither a survivor nor a removal may vanish in the rounding.
    filled = round(BAR_WIDTH * kept / total) if total else 0
    if 0 < kept < total:
        filled = min(max(filled, 1), BAR_WIDTH - 1)
    return "█" * filled + "░" * (BAR_WIDTH - filled)
