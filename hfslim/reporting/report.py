"""The report of a compression, on the screen, in JSON and in Markdown."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from hfslim.measuring.class_answers import ClassAnswers
from hfslim.measuring.measurement import Comparison, Measurement
from hfslim.measuring.timing import Latency
from hfslim.reporting import sparsity_text, tables
from hfslim.reporting.provenance import Provenance
from hfslim.reporting.readable_json import readable_json
from hfslim.reporting.seed_statistics import SeedStatistics
from hfslim.reporting.staged_writes import write_whole
from hfslim.reporting.tables import FigureRow, Section, formatted, markdown_table
from hfslim.reporting.verdict import title, verdict

__all__ = ["REPORT", "Quality", "Report"]

REPORT = "report.json"
CLASSES = 12
PLAIN = ("structure", "stages", "weight_sparsity", "warnings", "curve", "units", "history")
"""Fields whose values are plain already."""


@dataclass(frozen=True)
class Quality:
    """A metric of the compressed model and of its teacher, on the same examples.

    Attributes:
        metric: Name of the metric, such as `accuracy`.
        value: The compressed model's value.
        teacher: The teacher's value; None if it was not measured.
        data: Name of the examples, such as `test, 1,421 examples`.
        examples: Number of examples.
        seeds: Seeds of the runs whose mean the value is.
    """

    metric: str
    value: float
    teacher: float | None
    data: str
    examples: int | None = None
    seeds: Sequence[int] = ()

    @property
    def difference(self) -> float | None:
        """The value minus the teacher's value; None if that was not measured."""
        return None if self.teacher is None else self.value - self.teacher

    def cells(self, teachers: str = "") -> tuple[str, str, str]:
        """Return the teacher's value, followed by `teachers`, the value and the difference."""
        value = formatted(self.value, examples=self.examples)
        change = formatted(self.difference, "", "+", self.examples)
        return formatted(self.teacher, teachers, examples=self.examples), value, change


@dataclass(frozen=True)
class Report:
    """Cost and quality of a model before and after compression, and the path to it.

    Attributes:
        model: Name of the model.
        comparisons: Both models measured, once for each stated input; empty if not measured.
        quality: Metrics on held-out examples.
        structure: Rows `{"kind", "path", "kept", "total"}` of `Structure.table`.
        stages: The stages of the recipe: each stage's name to its settings.
        weight_sparsity: Rows of `WeightSparsity.to_dict`, the last for all modules; empty if the
            weights are dense.
        answers: The answers class by class, with the teacher's; None for regression, or if not
            measured.
        stability: Figures over several seeds; empty for a single run.
        warnings: Losses that the averages hide.
        curve: A point `{"label", "metric", "macs", "latency_ms"}` for each measured model: fraction
            of the multiply-accumulates, milliseconds by batch size; with its `seed` if there are
            several.
        units: Rows of `unit_rows`, with the `stage` that cut.
        history: `{"stage", "steps", "series", "metrics"}` of each stage that made a model, `series`
            as of `training_curves`; with its `seed` if there are several.
        provenance: The models, data and machine that the model was made with.
    """

    model: str
    comparisons: Sequence[Comparison] = ()
    quality: Sequence[Quality] = ()
    structure: Sequence[Mapping[str, Any]] = ()
    stages: Sequence[Mapping[str, Mapping[str, Any]]] = ()
    weight_sparsity: Sequence[Mapping[str, Any]] = ()
    answers: ClassAnswers | None = None
    stability: Sequence[SeedStatistics] = ()
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
        if not path.is_file():
            raise FileNotFoundError(
                f"no {REPORT} in {str(folder)!r}: give the folder of `hfslim run`, of a `measure` "
                "stage or of `hfslim prune`"
            )
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
            quality.append(Quality(**{**own, "seeds": tuple(own.get("seeds", ()))}))
        return cls(
            model=values["model"],
            comparisons=[_comparison(one) for one in values.get("comparisons", ())],
            quality=quality,
            answers=ClassAnswers.from_dict(answers) if answers else None,
            stability=[SeedStatistics.from_dict(one) for one in values.get("stability", ())],
            provenance=Provenance.from_dict(values.get("provenance", {})),
            **{name: values.get(name, ()) for name in PLAIN},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as nested dictionaries and lists of plain values, ready for JSON.

        A metric that is not finite, such as the correlation of constant predictions, is `None`.
        """
        values = {
            **vars(self),
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
            "quality": [_finite({**vars(q), "difference": q.difference}) for q in self.quality],
            "answers": self.answers and self.answers.to_dict(),
            "stability": [one.to_dict() for one in self.stability],
            "provenance": asdict(self.provenance),
        }
        return json.loads(json.dumps(values, allow_nan=False))

    def print(self, console: Console | None = None) -> None:
        """Print figures, tables and stages, by default on the terminal."""
        console = console or Console()
        headings, conditions = ("", "before", "after", "change"), self.measurement_conditions()
        figures = Section(self.model, headings, self.figures(), conditions, right=(1, 2, 3))
        for section in (figures, *self.sections()):
            section.print(console)
        for line in self.stage_lines():
            console.print(line, markup=False)

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        blocks = [
            f"# {title(self)}",
            *filter(None, [verdict(self)]),
            markdown_table(("", "before", "after", "change"), self.figures()),
            "\n".join(f"- {line}" for line in self.measurement_conditions()),
            *(section.to_markdown() for section in self.sections()),
        ]
        if self.stages:
            blocks += ["## How it was made", "\n".join(self.stage_lines())]
        return "\n\n".join(blocks) + "\n"

    def write(self, folder: str | Path) -> None:
        """Make the folder, and write `report.md`, then `report.json` in one step."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.md").write_text(self.to_markdown(), encoding="utf-8")
        write_whole(folder / REPORT, readable_json(self.to_dict()) + "\n")

    def figures(self) -> list[FigureRow]:
        """Return the rows of costs and metrics."""
        rows = tables.cost_rows(self.comparisons)
        for q in self.quality:
            rows.append(FigureRow(f"{q.metric}, {q.data}", *q.cells(" (teacher)")))
        return rows

    def measurement_conditions(self) -> list[str]:
        """Return the input, device, dtype, threads and calls of each measurement."""
        lines = tables.measurement_conditions(self.comparisons)
        if lines and self.stability:
            return [f"Costs are those of seed {self.stability[0].seeds[0]}.", *lines]
        return lines

    def sections(self) -> list[Section]:
        """Return the tables below the figures: answers, kept units, zeros."""
        return [*self.answer_sections(), *self.structure_sections()]

    def answer_sections(self) -> list[Section]:
        """Return the tables of the model's answers: over seeds, and class by class."""
        warnings = [f"Warning: {warning}." for warning in self.warnings]
        sections = []
        if self.stability:
            rows = [(*one.cells(), *one.by_seed()) for one in self.stability]
            seeds = self.stability[0].seeds
            headings = ("", "mean", "spread", "worst", "seed of it", *map(str, seeds))
            note = (
                "Spread: standard deviation over the seeds. Metrics are means, answers are added "
                f"up; single costs, kept units and losses are those of seed {seeds[0]}."
            )
            over, right = f"Over {len(seeds)} seeds", range(1, len(headings))
            sections.append(Section(over, headings, rows, [note, *warnings], right=right))
        if self.answers:
            sections.append(_worst_classes(self.answers, () if self.stability else warnings))
        return sections

    def structure_sections(self, with_units: bool = True) -> list[Section]:
        """Return the tables of kept units and of zero weights."""
        sections, sparse = [], self.weight_sparsity
        if self.structure and with_units:
            headings = ("layer", "units", "kept", "")
            bars = tables.kept_rows(self.structure)
            sections.append(Section("Kept in each layer", headings, bars, code=(0, 2), right=(3,)))
        if sparse:
            rows, notes = sparsity_text.table_rows(sparse), [sparsity_text.speed_note(sparse)]
            zeros = "Zeros among the weights"
            sections.append(Section(zeros, sparsity_text.HEADINGS, rows, notes))
        return sections

    def stage_lines(self) -> list[str]:
        """Return the numbered stages with their settings."""
        stages = [(name, settings) for stage in self.stages for name, settings in stage.items()]
        return [
            f"{number}. {name}: " + ", ".join(f"{key}={value}" for key, value in settings.items())
            if settings
            else f"{number}. {name}"
            for number, (name, settings) in enumerate(stages, start=1)
        ]


def _comparison(values: Mapping[str, Any]) -> Comparison:
    sides = {
        side: Measurement(**{**values[side], "latency": Latency(**values[side]["latency"])})
        for side in ("before", "after")
    }
    return Comparison(**{**values, **sides})


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _worst_classes(answers: ClassAnswers, warnings: Sequence[str]) -> Section:
    """Return the table of classes, of many classes only those that lost most."""
    lines, notes = answers.lines(), [*answers.notes(), *warnings]
    if len(lines) > CLASSES:
        notes.append(f"The {CLASSES} of {len(lines)} classes that fare worst; all: {REPORT}.")
        lines = sorted(lines, key=lambda line: (line.change or 0.0, line.model))[:CLASSES]
    return tables.class_table(lines, notes)
