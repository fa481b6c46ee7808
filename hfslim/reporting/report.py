"""What compression did to a model: one table on the screen, in JSON and in Markdown."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hfslim.measuring.class_answers import ClassAnswers
from hfslim.measuring.measurement import Comparison, Measurement
from hfslim.measuring.timing import Latency
from hfslim.reporting import sparsity_text, tables
from hfslim.reporting.provenance import Provenance
from hfslim.reporting.readable_json import lined
from hfslim.reporting.seed_statistics import Spread
from hfslim.reporting.staged_writes import write_whole
from hfslim.reporting.tables import Row, Section, markdown_table, number

__all__ = ["REPORT", "Quality", "Report"]

REPORT = "report.json"
CLASSES = 12


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
        answers: What the model answers class by class, beside its teacher; None for regression, or
            if not measured.
        stability: Figures over several seeds; none of a single run.
        warnings: What the averages hide.
        curve: A point `{"label", "metric", "macs", "latency_ms"}` for each model that was measured:
            share of the multiply-accumulates, milliseconds by batch size; with its `seed` if there
            are several.
        units: Rows of `units_of`, with the `stage` that cut.
        history: `{"stage", "steps", "series", "metrics"}` of each stage that made a model, `series`
            as of `series_of`.
        provenance: What the model was made from, and on which machine.
    """

    model: str
    comparisons: Sequence[Comparison] = ()
    quality: Sequence[Quality] = ()
    structure: Sequence[Mapping[str, Any]] = ()
    stages: Sequence[Mapping[str, Mapping[str, Any]]] = field(default=())
    weight_sparsity: Sequence[Mapping[str, Any]] = ()
    answers: ClassAnswers | None = None
    stability: Sequence[Spread] = ()
    warnings: Sequence[str] = ()
    curve: Sequence[Mapping[str, Any]] = ()
    units: Sequence[Mapping[str, Any]] = ()
    history: Sequence[Mapping[str, Any]] = ()
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
        quality, answers = [], values.get("answers")
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
            answers=ClassAnswers.from_dict(answers) if answers else None,
            stability=[Spread.from_dict(one) for one in values.get("stability", ())],
            warnings=values.get("warnings", ()),
            curve=values.get("curve", ()),
            units=values.get("units", ()),
            history=values.get("history", ()),
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
            "answers": self.answers and self.answers.to_dict(),
            "stability": [one.to_dict() for one in self.stability],
            "warnings": list(self.warnings),
            "curve": [dict(point) for point in self.curve],
            "units": [dict(row) for row in self.units],
            "history": [dict(one) for one in self.history],
            "provenance": asdict(self.provenance),
        }
        return json.loads(json.dumps(values, allow_nan=False))

    def print(self, console: Console | None = None) -> None:
        """Show the figures, the tables of `sections`, and the stages.

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
        for section in self.sections():
            section.print(console)
        for line in self.path():
            console.print(line, markup=False)

    def to_markdown(self) -> str:
        """The report as Markdown."""
        blocks = [
            f"# {self.model}",
            markdown_table(("", "before", "after", "change"), self.figures()),
            "\n".join(f"- {line}" for line in self.conditions()),
            *(section.to_markdown() for section in self.sections()),
        ]
        if self.stages:
            blocks += ["## How it was made", "\n".join(self.path())]
        return "\n\n".join(blocks) + "\n"

    def write(self, folder: str | Path) -> None:
        """Write `report.md`, and then `report.json` in one step.

        Args:
            folder: Where to write; made if it does not exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.md").write_text(self.to_markdown(), encoding="utf-8")
        write_whole(folder / REPORT, lined(self.to_dict()) + "\n")

    def figures(self) -> list[Row]:
        """The lines of the table of figures."""
        rows = self.costs()
        for q in self.quality:
            values = (number(q.teacher, " (teacher)"), number(q.value))
            rows.append(Row(f"{q.metric}, {q.data}", *values, number(q.difference, sign="+")))
        return rows

    def costs(self) -> list[Row]:
        """The lines of parameters, bytes, multiply-accumulates and times."""
        return tables.costs(self.comparisons)

    def conditions(self) -> list[str]:
        """What each measurement holds for: input, device, dtype, threads, calls."""
        lines = tables.conditions(self.comparisons)
        if lines and self.stability:
            return [f"Costs are those of seed {self.stability[0].seeds[0]}.", *lines]
        return lines

    def behaviour(self) -> list[Section]:
        """The tables of what the model answers: over seeds, and class by class."""
        warnings = [f"Warning: {told}." for told in self.warnings]
        sections = []
        if self.stability:
            rows = [one.cells() for one in self.stability]
            headings = ("", "mean", "spread", "worst", "seed of it")
            title = f"Over {len(self.stability[0].seeds)} seeds"
            told = (
                "Spread: standard deviation over the seeds. Metrics are means, answers are added "
                "up; single costs, kept units and losses are those of seed "
                f"{self.stability[0].seeds[0]}."
            )
            notes = [told, *warnings]
            sections.append(Section(title, headings, rows, notes, right=(1, 2, 3, 4)))
        if self.answers:
            sections.append(_by_class(self.answers, () if self.stability else warnings))
        return sections

    def sections(self) -> list[Section]:
        """The tables below that of the figures: behaviour, kept units, zeros."""
        return [*self.behaviour(), *self.rest()]

    def rest(self, with_units: bool = True) -> list[Section]:
        """The tables of kept units, and of zeros."""
        sections = []
        if self.structure and with_units:
            headings = ("layer", "units", "kept", "")
            bars = tables.kept(self.structure)
            sections.append(Section("Kept in each layer", headings, bars, code=(0, 2), right=(3,)))
        if self.weight_sparsity:
            cells, use = (
                sparsity_text.cells(self.weight_sparsity),
                sparsity_text.use(self.weight_sparsity),
            )
            sections.append(
                Section("Zeros among the weights", sparsity_text.HEADINGS, cells, [use])
            )
        return sections

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


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _by_class(answers: ClassAnswers, warnings: Sequence[str]) -> Section:
    """Return the classes and how they fare, the worst of them where they are many."""
    lines, notes = answers.lines(), [*answers.notes(), *warnings]
    if len(lines) > CLASSES:
        notes.append(f"The {CLASSES} of {len(lines)} classes that fare worst; all: {REPORT}.")
        lines = sorted(lines, key=lambda line: (line.change or 0.0, line.model))[:CLASSES]
    return tables.by_class(lines, notes)
