"""The report as one self-contained web page, and its figures as PNG files."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hfslim.reporting.plots import plots_of
from hfslim.reporting.plots.style import to_png, to_svg
from hfslim.reporting.report import Report
from hfslim.reporting.verdict import title, verdict

__all__ = ["page", "write_all", "write_page"]

logger = logging.getLogger(__name__)

PAGE, FIGURES = "report.html", "figures"


def page(report: Report) -> str:
    """Return a report as HTML that holds its styles, its figures and the report itself.

    The same report gives the same text. The page has no scripts, and follows the reader's choice of
    light or dark.
    """
    inside = json.dumps(report.to_dict(), separators=(",", ":")).replace("<", "\\u003c")
    environment = Environment(
        loader=PackageLoader("hfslim.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = report.provenance
    origins = {
        "Task": made.task,
        "Base model": made.base,
        "Teacher": made.teacher,
        "Data": made.data,
        "Seeds": ", ".join(map(str, made.seeds)),
        "Machine": made.machine,
    }
    return environment.get_template("page.html.jinja").render(
        report=report,
        title=title(report),
        verdict=verdict(report),
        tiles=_tiles(report),
        drawn=[(plot, Markup(to_svg(plot))) for plot in plots_of(report)],
        answers=report.answer_sections(),
        structure=report.structure_sections(with_units=not report.units),
        about=" · ".join(str(part) for part in (made.task, made.data) if part),
        origins={name: str(value) for name, value in origins.items() if value},
        runs=[f"seed-{seed}" for seed in report.stability[0].seeds] if report.stability else [],
        values=Markup(inside),
    )


def write_page(report: Report, folder: str | Path) -> Path:
    """Write `report.html` and, in `figures`, PNG files; return the path of the page."""
    path = Path(folder) / PAGE
    path.write_text(page(report), encoding="utf-8")
    pictures = path.with_name(FIGURES)
    pictures.mkdir(exist_ok=True)
    for plot in plots_of(report):
        (pictures / f"{plot.name}.png").write_bytes(to_png(plot))
    return path


def write_all(report: Report, folder: Path, tensorboard: bool = False) -> None:
    """Write a report as a page with figures, in Markdown and in JSON, if asked to TensorBoard too.

    Raises:
        ImportError: tensorboard is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("report in %s", write_page(report, folder))
    if tensorboard:
        _log_to_tensorboard(report, folder / "tensorboard")
    # report.json is the last file: where it exists, the report is complete.
    report.write(folder)


def _log_to_tensorboard(report: Report, folder: Path) -> None:
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    values: dict[str, float | None] = {}
    for quality in report.quality:
        values[quality.metric] = quality.value
        values[f"{quality.metric} before"] = quality.teacher
    for compared in report.comparisons:
        values[f"speedup, batch {compared.after.latency.batch_size}"] = compared.speedup
    if report.answers is not None:
        values |= {"calibration error": report.answers.ece, "churn": report.answers.churn}
    with SummaryWriter(str(folder)) as writer:
        for plot in plots_of(report):
            pixels = imread(io.BytesIO(to_png(plot)))[..., :3]
            writer.add_image(f"report/{plot.name}", pixels, dataformats="HWC")
        for name, value in values.items():
            if value is not None:
                writer.add_scalar(f"report/{name}", value)
        writer.add_text("report", report.to_markdown())


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """Return the main figures, means over seeds: name, value, a note on the value."""
    tiles, over = [], {one.figure: one for one in report.stability}
    for quality in report.quality[:1]:
        teacher, value, _ = quality.cells()
        note = "" if quality.teacher is None else f"{teacher} before"
        tiles.append((quality.metric, value, note))
    for compared in report.comparisons[:1]:
        before, after = compared.before, compared.after
        several = over.get(f"MACs kept, batch {after.latency.batch_size}")
        kept = after.macs / before.macs if before.macs else 1.0
        kept = several.mean if several else kept
        tiles.append(("MACs kept", f"{kept:.1%}", "multiply-accumulates"))
        share = after.parameters / before.parameters
        seed = f", seed {several.seeds[0]}" if several else ""
        tiles.append(("parameters kept", f"{share:.1%}", f"{after.parameters:,}{seed}"))
    for compared in [*report.comparisons[:1], *report.comparisons[1:][-1:]]:
        figure = f"speedup, batch {compared.after.latency.batch_size}"
        several = over.get(figure)
        faster, interval = compared.speedup, f"{compared.low:.2f} to {compared.high:.2f}"
        if several:
            faster = several.mean
            interval = f"{min(several.values):.2f} to {max(several.values):.2f} by seed"
        tiles.append((figure, f"{faster:.2f}×", interval))
    answers = report.answers
    if answers is not None and answers.churn is not None:
        tiles.append(("churn", f"{answers.churn:.1%}", "answers that changed"))
    return tiles
