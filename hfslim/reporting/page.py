"""A report as one web page that needs nothing else, and its figures as PNG files."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from hfslim.reporting.plots import check_matplotlib, plots, to_png, to_svg
from hfslim.reporting.report import Report

__all__ = ["FIGURES", "PAGE", "page", "publish", "write_page"]

logger = logging.getLogger(__name__)

PAGE, FIGURES = "report.html", "figures"


def page(report: Report) -> str:
    """Return a report as HTML, with everything inside: styles, figures and the report itself.

    The same report gives the same text. It has no scripts, and follows the reader's choice of light
    or dark.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    check_matplotlib()
    values = report.to_dict()
    inside = json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")
    drawn = [(plot, Markup(to_svg(plot))) for plot in plots(report)]
    environment = Environment(
        loader=PackageLoader("hfslim.reporting", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.trim_blocks = environment.lstrip_blocks = True
    made = report.provenance
    return environment.get_template("page.html.jinja").render(
        report=report,
        tiles=_tiles(report),
        drawn=drawn,
        figures=report.figures(),
        behaviour=report.behaviour(),
        rest=report.rest(with_units=not report.units),
        conditions=report.conditions(),
        about=" · ".join(str(part) for part in (made.task, made.data) if part),
        origins=[
            (name, str(value))
            for name, value in (
                ("Task", made.task),
                ("Base model", made.base),
                ("Teacher", made.teacher),
                ("Data", made.data),
                ("Seeds", ", ".join(map(str, made.seeds))),
                ("Machine", made.machine),
            )
            if value
        ],
        losses=list(made.losses.items()),
        runs=[f"seed-{seed}" for seed in report.stability[0].seeds] if report.stability else [],
        values=Markup(inside),
    )


def write_page(report: Report, folder: str | Path) -> Path:
    """Write `report.html`, and each of its figures as a PNG file in `figures`.

    Args:
        report: What to show.
        folder: Where to write; it exists.

    Returns:
        The path of the page.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    folder = Path(folder)
    text = page(report)
    path = folder / PAGE
    path.write_text(text, encoding="utf-8")
    pictures = folder / FIGURES
    pictures.mkdir(exist_ok=True)
    for plot in plots(report):
        (pictures / f"{plot.name}.png").write_bytes(to_png(plot))
    return path


def publish(report: Report, folder: Path, tensorboard: bool = False) -> None:
    """Write a report in all its forms, pages and figures where matplotlib is installed.

    Args:
        report: What to write.
        folder: Where; made if it does not exist.
        tensorboard: Whether to log figures, numbers and text to TensorBoard too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        check_matplotlib()
    except RuntimeError as error:
        logger.warning("no %s: %s, then hfslim report %s", folder / PAGE, error, folder)
    else:
        logger.info("report in %s", write_page(report, folder))
        if tensorboard:
            log_to_tensorboard(report, folder / "tensorboard")
    # Last: where it is, all of the report is.
    report.write(folder)


def log_to_tensorboard(report: Report, folder: Path) -> None:
    """Log the figures, what stands out and the text of a report.

    Raises:
        ImportError: tensorboard is not installed.
    """
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for plot in plots(report):
            picture = Image.open(io.BytesIO(to_png(plot))).convert("RGB")
            writer.add_image(f"report/{plot.name}", np.asarray(picture), dataformats="HWC")
        for quality in report.quality:
            writer.add_scalar(f"report/{quality.metric}", quality.value)
            if quality.teacher is not None:
                writer.add_scalar(f"report/{quality.metric} before", quality.teacher)
        for compared in report.comparisons:
            batch = compared.after.latency.batch_size
            writer.add_scalar(f"report/speedup, batch {batch}", compared.speedup)
        if report.answers is not None:
            writer.add_scalar("report/calibration error", report.answers.ece)
            if report.answers.churn is not None:
                writer.add_scalar("report/churn", report.answers.churn)
        writer.add_text("report", report.to_markdown())


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """Return the figures that stand out, means over seeds: what, how much, beside what."""
    tiles, over = [], {one.figure: one for one in report.stability}
    for quality in report.quality[:1]:
        beside = "" if quality.teacher is None else f"{quality.teacher:.4f} before"
        tiles.append((quality.metric, f"{quality.value:.4f}", beside))
    for compared in report.comparisons[:1]:
        before, after = compared.before, compared.after
        several = over.get(f"MACs kept, batch {after.latency.batch_size}")
        kept = after.macs / before.macs if before.macs else 1.0
        kept = several.mean if several else kept
        tiles.append(("MACs kept", f"{kept:.1%}", "multiply-accumulates"))
        share = after.parameters / before.parameters
        whose = f", seed {several.seeds[0]}" if several else ""
        tiles.append(("parameters kept", f"{share:.1%}", f"{after.parameters:,}{whose}"))
    for compared in _ends(report.comparisons):
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


def _ends(comparisons: Sequence[Any]) -> list[Any]:
    return [*comparisons[:1], *comparisons[1:][-1:]]
