"""The colours of figures on pages and on paper, and the functions that render a figure."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO
from xml.sax.saxutils import escape

from hfslim.reporting.tables import Section

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from hfslim.reporting.report import Report

__all__ = [
    *("PAGE", "PAPER", "Plot", "Theme", "label_rows", "new_figure", "save", "stacked_axes"),
    *("of_seed", "to_png", "to_svg"),
]

WIDTH = 3.4
"""Inches, 245 points: on a phone, 324 pixels of CSS, 6.5 points are 8.6 pixels."""
LETTER, ROW = 0.06, 0.17
"""The width of a letter of a label, and the height of a row of a map, in inches."""
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
"""From the palette of Okabe and Ito, whose colours are distinct under colour blindness."""
MARKS = ("o", "s", "D", "^", "v", "P")
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
HATCHES = ("", "////", "\\\\\\\\", "xxx")


@dataclass(frozen=True)
class Theme:
    """The colours of a figure.

    Attributes:
        ink: Text.
        muted: Axes and secondary text.
        grid: Lines behind the data.
        paper: The ground of the figure.
        card: The ground of a legend.
        on_series: Text on the first colour of the series.
        series: What is compared: the model, the teacher, and more.
    """

    ink: str
    muted: str
    grid: str
    paper: str
    card: str
    on_series: str
    series: tuple[str, str, str, str]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of matplotlib; names are plain text, never formulas."""
        inked = ("axes.label", "axes.title", "legend.label", "text.", "xtick.label", "ytick.label")
        return {
            **{f"{one}color": self.ink for one in inked},
            **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), self.muted),
            **dict.fromkeys(("figure.facecolor", "savefig.facecolor"), self.paper),
            **dict.fromkeys(("axes.labelsize", "font.size"), 8),
            **dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 7.5),
            **dict.fromkeys(("grid.linewidth", "hatch.linewidth"), 0.6),
            **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.fancybox"), False),
            **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
            "axes.facecolor": "none",
            "axes.titlelocation": "left",
            "axes.titlesize": 8.5,
            "font.family": "sans-serif",
            "grid.color": self.grid,
            "legend.edgecolor": "none",
            "legend.facecolor": self.card,
            "lines.linewidth": 1.5,
            "svg.fonttype": "none",
            "svg.hashsalt": "hfslim",
            "text.parse_math": False,
        }


WHITE = "#ffffff"
PAPER = Theme("#1b1f24", "#59636e", "#dfe3e8", WHITE, WHITE, WHITE, (BLUE, ORANGE, GREEN, PINK))
PAGE = Theme(
    *("#000001", "#000002", "#000003", "none", "#000004", "#000005"),
    ("#000011", "#000012", "#000013", "#000014"),
)
"""Placeholders. `to_svg` replaces them by CSS variables, which the page sets for light or dark."""
VARIABLES = {
    **{PAGE.ink: "ink", PAGE.muted: "muted", PAGE.grid: "grid"},
    **{PAGE.card: "card", PAGE.on_series: "on-series"},
    **{colour: f"series-{number}" for number, colour in enumerate(PAGE.series, 1)},
}


@dataclass(frozen=True)
class Plot:
    """A figure with its description in words and its numbers.

    Attributes:
        name: The name of its files and anchors.
        title: The heading above it.
        alt: A description in words.
        draw: A function that draws it in a theme.
        table: The numbers behind it.
    """

    name: str
    title: str
    alt: str
    draw: Callable[[Theme], Figure]
    table: Section


def of_seed(report: Report) -> str:
    """Return what names the seed of a figure that shows the first of several."""
    return f", seed {report.stability[0].seeds[0]}" if report.stability else ""


def new_figure(
    height: float, rows: int = 1, columns: int = 1, width: float = WIDTH, **options: Any
) -> tuple[Figure, list[Any]]:
    """Return an empty figure, in inches, and its axes; `options` are those of `subplots`."""
    # A figure without pyplot has a canvas of its own: the user's backend stays as it is.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def stacked_axes(rows: Sequence[int], width: float = WIDTH) -> tuple[Figure, list[Any]]:
    """Return a figure of maps below one another, whose heights follow their numbers of rows."""
    ratios = [max(number, 2) for number in rows]
    height = ROW * sum(ratios) + 0.42 * len(ratios)
    return new_figure(height, len(ratios), width=width, height_ratios=ratios)


def label_rows(axes: Any, labels: Sequence[str], title: str, width: float = WIDTH) -> None:
    """Label the rows of a map, row `i` at `y = i`, and shorten a title that is too long.

    The title is `what in pattern`, or any text; `width` is that of labels, axes and what stands
    beside them, in inches.
    """
    # The end of a pattern is more specific than its start.
    kind, within, pattern = title.partition(" in ")
    letters = int((width - LETTER * max(map(len, labels))) / 1.16 / LETTER)
    room = max(letters - len(kind) - len(within), 1)
    end = pattern[len(pattern) - room + 1 :].lstrip(".")
    short = pattern if len(pattern) <= room else f"…{end}"
    axes.set_title(f"{kind}{within}{short}", fontsize=7.5)
    axes.set_yticks(range(len(labels)), labels, fontsize=6.5)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xticks([])
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def save(draw: Callable[[Theme], Figure], file: Path | BinaryIO, **options: Any) -> None:
    """Draw on white paper, 200 dots per inch; `options` are those of `savefig`."""
    _render(draw, PAPER, file, dpi=200, **options)


def to_png(plot: Plot) -> bytes:
    """Return a figure as a PNG file."""
    file = io.BytesIO()
    save(plot.draw, file, format="png")
    return file.getvalue()


def to_svg(plot: Plot) -> str:
    """Return a figure as an SVG element for a page, in the page's colours.

    The same report gives the same text. No identifier occurs in the SVG of another plot, and
    nothing in it refers to anything outside.
    """
    file = io.BytesIO()
    _render(plot.draw, PAGE, file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]+"', text)
    assert view is not None
    title, described = f"{plot.name}-title", f"{plot.name}-alt"
    head = (
        f'<svg {view[0]} role="img" aria-labelledby="{title} {described}">\n'
        f'<title id="{title}">{escape(plot.title)}</title>\n'
        f'<desc id="{described}">{escape(plot.alt)}</desc>'
    )
    body = text[text.index(">") + 1 :]
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', body))
    body = re.sub(
        r' id="([^"]+)"',
        lambda found: f' id="{plot.name}-{found[1]}"' if found[1] in used else "",
        body,
    )
    body = body.replace("url(#", f"url(#{plot.name}-")
    body = body.replace('xlink:href="#', f'href="#{plot.name}-').replace("xlink:href", "href")
    for colour, name in VARIABLES.items():
        body = body.replace(colour, f"var(--{name})")
    return head + body.strip()


def _render(draw: Callable[[Theme], Figure], theme: Theme, file: Any, **options: Any) -> None:
    import matplotlib

    settings: Any = theme.settings
    with matplotlib.rc_context(settings):
        draw(theme).savefig(file, **options)
