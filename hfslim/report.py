"""What compression did to a model: one table on the screen, in JSON and in Markdown."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hfslim import zeros
from hfslim.measure import Comparison, Measurement
from hfslim.picture import natural
from hfslim.provenance import Provenance
from hfslim.timing import Latency

__all__ = ["NOT_MEASURED", "REPORT", "Quality", "Report", "Row", "markdown_table"]

BAR_WIDTH = 24
REPORT = "report.json"
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


@dataclass(frozen=True)
class Quality:
    """A metric of the compressed model beside its teacher's, on the same examples.

    Attributes:
        metric: Name of the metric, such as `accuracy`.
        value: The compressed model's value.
        teacher: The teacher's value; None if it was not measured.
        data: Name of the examples, such as `test, 1,421 examples`.
        examples: Number of examples.
        seeds: Seeds of the runs that the value is taken over.
    """

    metric: str
    value: float
    teacher: float | None
    data: str
    examples: int | None = None
    seeds: Sequence[int] = ()

    @property
    def difference(self) -> float | None:
        """Value less the teacher's value; None if that was not measured."""
        return None if self.teacher is None else self.value - self.teacher


class Row(NamedTuple):
    """A line of the table of figures: what it is, before, after, and how they relate."""

    figure: str
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class Report:
    """Cost and quality of a model before and after compression, and how it was made.

    Attributes:
        model: Name of the model.
        comparisons: Both models measured, once for each stated input; none if not measured.
        quality: Metrics on held-out examples.
        structure: A row `{"kind", "path", "kept", "total"}` for each place where units can be
            removed, as `Structure.table` gives them.
        stages: The path taken, as in a recipe: each stage's name to its settings.
        weight_sparsity: Zeros of each kind of module, the last row of all, as of
            `WeightSparsity.to_dict`; none if the weights are dense.
        provenance: What the model was made from, and on which machine.
    """

    model: str
    comparisons: Sequence[Comparison] = ()
    quality: Sequence[Quality] = ()
    structure: Sequence[Mapping[str, Any]] = ()
    stages: Sequence[Mapping[str, Mapping[str, Any]]] = field(default=())
    weight_sparsity: Sequence[Mapping[str, Any]] = ()
    provenance: Provenance = field(default_factory=Provenance)

    @classmethod
    def load(cls, folder: str | Path) -> "Report":
        """Read the `report.json` of a folder.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is not what `write` writes.
        """
        path = Path(folder) / REPORT
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a report of hfslim: {error!r}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        """Rebuild a report from what `to_dict` gives."""
        quality = []
        for one in values.get("quality", ()):
            own = {key: value for key, value in one.items() if key != "difference"}
            own["value"] = math.nan if own["value"] is None else own["value"]
            own["seeds"] = tuple(own.get("seeds", ()))
            quality.append(Quality(**own))
        return cls(
            model=values["model"],
            comparisons=[_comparison(one) for one in values.get("comparisons", ())],
            quality=quality,
            structure=values.get("structure", ()),
            stages=values.get("stages", ()),
            weight_sparsity=values.get("weight_sparsity", ()),
            provenance=Provenance.from_dict(values.get("provenance", {})),
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as nested dictionaries and lists of plain values, ready for JSON.

        A metric that is not finite, such as the correlation of constant predictions, is `None`.
        """
        values = {
            "model": self.model,
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
            "quality": [_finite({**vars(q), "difference": q.difference}) for q in self.quality],
            "structure": [dict(row) for row in self.structure],
            "stages": [{name: dict(made) for name, made in s.items()} for s in self.stages],
            "weight_sparsity": [dict(row) for row in self.weight_sparsity],
            "provenance": asdict(self.provenance),
        }
        return json.loads(json.dumps(values, allow_nan=False))

    def print(self, console: Console | None = None) -> None:
        """Show the figures, the kept units of each layer as bars, and the stages.

        Args:
            console: Where to print; the terminal if none is given.
        """
        console = console or Console()
        figures = Table(title=escape(self.model), title_justify="left", caption_justify="left")
        figures.caption = escape("\n".join(self.conditions()))
        figures.add_column("")
        for heading in ("before", "after", "change"):
            figures.add_column(heading, justify="right")
        for row in self.figures():
            figures.add_row(*map(escape, row))
        console.print(figures)
        if self.structure:
            kept = Table(title="Kept in each layer", title_justify="left")
            for heading in ("layer", "units", "kept"):
                kept.add_column(heading)
            kept.add_column("", justify="right")
            for path, kind, bar, count in self.kept():
                kept.add_row(path, kind, bar, count)
            console.print(kept)
        if self.weight_sparsity:
            found = Table(*zeros.HEADINGS, title="Zeros among the weights", title_justify="left")
            for cells in zeros.cells(self.weight_sparsity):
                found.add_row(*cells)
            console.print(found)
            console.print(zeros.use(self.weight_sparsity), markup=False)
        for line in self.path():
            console.print(line, markup=False)

    def to_markdown(self) -> str:
        """The report as Markdown."""
        blocks = [
            f"# {self.model}",
            markdown_table(("", "before", "after", "change"), self.figures()),
            "\n".join(f"- {line}" for line in self.conditions()),
        ]
        if self.structure:
            rows = [(f"`{path}`", kind, f"`{bar}`", n) for path, kind, bar, n in self.kept()]
            table = markdown_table(("layer", "units", "kept", ""), rows)
            blocks += ["## Kept in each layer", table]
        if self.weight_sparsity:
            table = markdown_table(zeros.HEADINGS, zeros.cells(self.weight_sparsity))
            blocks += ["## Zeros among the weights", table, zeros.use(self.weight_sparsity)]
        if self.stages:
            blocks += ["## How it was made", "\n".join(self.path())]
        return "\n\n".join(blocks) + "\n"

    def write(self, folder: str | Path) -> None:
        """Write `report.json` and `report.md`.

        Args:
            folder: Where to write; made if it does not exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        (folder / REPORT).write_text(text + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self.to_markdown(), encoding="utf-8")

    def figures(self) -> list[Row]:
        """The lines of the table of figures."""
        rows = self.costs()
        for q in self.quality:
            values = (
                _number(q.teacher, " (teacher)"),
                _number(q.value),
                _number(q.difference, sign="+"),
            )
            rows.append(Row(f"{q.metric}, {q.data}", *values))
        return rows

    def costs(self) -> list[Row]:
        """The lines of parameters, bytes, multiply-accumulates and times."""
        if not self.comparisons:
            return [Row(figure, NOT_MEASURED, NOT_MEASURED, "-") for figure in COSTS]
        before, after = self.comparisons[0].before, self.comparisons[0].after
        rows = [
            _count("parameters", before.parameters, after.parameters),
            _count(
                "parameters without embeddings",
                before.parameters_without_embeddings,
                after.parameters_without_embeddings,
            ),
            _count("bytes of weights", before.bytes, after.bytes),
        ]
        for c in self.comparisons:
            at = f"batch {c.after.latency.batch_size}"
            rows.append(_count(f"MACs, {at}", c.before.macs, c.after.macs))
            rows += _times(at, c)
        return rows

    def conditions(self) -> list[str]:
        """What each measurement holds for: input, device, dtype, threads, calls."""
        lines = []
        for c in self.comparisons:
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

    def kept(self) -> list[tuple[str, str, str, str]]:
        """Layer, kind of unit, a bar and the numbers kept and before, layer by layer."""
        return [
            (
                row["path"],
                row["kind"],
                _bar(row["kept"], row["total"]),
                f"{row['kept']:,} / {row['total']:,}",
            )
            for row in sorted(self.structure, key=lambda row: natural(row["path"]))
        ]

    def path(self) -> list[str]:
        """The stages, numbered, with their settings."""
        made = [(name, settings) for stage in self.stages for name, settings in stage.items()]
        return [
            f"{number}. {name}: " + ", ".join(f"{key}={value}" for key, value in settings.items())
            if settings
            else f"{number}. {name}"
            for number, (name, settings) in enumerate(made, start=1)
        ]


def _comparison(values: Mapping[str, Any]) -> Comparison:
    sides = {
        side: Measurement(
            **{**values[side], "latency": Latency(**values[side]["latency"])},
        )
        for side in ("before", "after")
    }
    return Comparison(**{**values, **sides})


def _number(value: float | None, after: str = "", sign: str = "") -> str:
    return NOT_MEASURED if value is None else f"{value:{sign}.4f}{after}"


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


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


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows as a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in x) + " |" for x in lines)
