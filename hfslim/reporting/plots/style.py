"""How figures look: one set of colours for pages in light and dark, one for PNG files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfslim.reporting.tables import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PAGE", "PAPER", "Plot", "Theme", "check_matplotlib", "new_figure", "to_png", "to_svg"]

WIDTH = 3.4
"""Inches, 245 points: on a phone, 324 pixels of CSS, 6.5 points are 8.6 pixels."""
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
"""Of Okabe and Ito's palette, which all kinds of colour vision tell apart."""
MARKS = ("o", "s", "D", "^", "v", "P")
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
HATCHES = ("", "////", "\\\\\\\\", "xxx")


@dataclass(frozen=True)
class Theme:
    """Colours of a figure.

    Attributes:
        ink: Of text.
        muted: Of axes and lesser text.
        grid: Of lines behind the data.
        paper: Behind the figure.
        card: Behind a legend.
        on_series: Of text on the first colour of the series.
        series: Of what is compared: the model, the teacher, and more.
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
        """Settings of matplotlib; names are text, never formulas."""
        return {
            "axes.edgecolor": self.muted,
            "axes.facecolor": "none",
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.labelcolor": self.ink,
            "axes.labelsize": 8,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlecolor": self.ink,
            "axes.titlelocation": "left",
            "axes.titlesize": 8.5,
            "figure.facecolor": self.paper,
            "font.family": "sans-serif",
            "font.size": 8,
            "grid.color": self.grid,
            "grid.linewidth": 0.6,
            "hatch.linewidth": 0.6,
            "legend.fontsize": 7.5,
            "legend.edgecolor": "none",
            "legend.facecolor": self.card,
            "legend.fancybox": False,
            "legend.labelcolor": self.ink,
            "lines.linewidth": 1.5,
            "savefig.facecolor": self.paper,
            "svg.fonttype": "none",
            "svg.hashsalt": "hfslim",
            "text.color": self.ink,
            "text.parse_math": False,
            "xtick.color": self.muted,
            "xtick.labelcolor": self.ink,
            "xtick.labelsize": 7.5,
            "ytick.color": self.muted,
            "ytick.labelcolor": self.ink,
            "ytick.labelsize": 7.5,
        }


WHITE = "#ffffff"
PAPER = Theme("#1b1f24", "#59636e", "#dfe3e8", WHITE, WHITE, WHITE, (BLUE, ORANGE, GREEN, PINK))
PAGE = Theme(
    *("#000001", "#000002", "#000003", "none", "#000004", "#000005"),
    ("#000011", "#000012", "#000013", "#000014"),
)
"""Placeholders, which `to_svg` makes variables of the page, so that it decides on light or dark."""
VARIABLES = {
    **{PAGE.ink: "ink", PAGE.muted: "muted", PAGE.grid: "grid"},
    **{PAGE.card: "card", PAGE.on_series: "on-series"},
    **{colour: f"series-{number}" for number, colour in enumerate(PAGE.series, 1)},
}


@dataclass(frozen=True)
class Plot:
    """A figure with what it says in words and numbers.

    Attributes:
        name: Of its files and anchors.
        title: What stands above.
        alt: What it shows, in words.
        draw: Draws it in a theme.
        table: The numbers behind it.
    """

    name: str
    title: str
    alt: str
    draw: Callable[[Theme], Figure]
    table: Section


def check_matplotlib() -> None:
    """Refuse to draw where matplotlib is not installed.

    Raises:
        RuntimeError: It is not.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError("pictures need matplotlib: pip install 'hfslim[plots]'") from error


def new_figure(height: float, rows: int = 1, **ratios: Any) -> tuple[Figure, list[Any]]:
    """Return an empty figure as wide as a phone, with axes from top to bottom.

    Args:
        height: In inches.
        rows: Number of axes.
        ratios: Further arguments of matplotlib's `subplots`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, **ratios)
    return figure, list(axes[:, 0])


def to_png(plot: Plot) -> bytes:
    """Draw on white paper, at 200 dots per inch."""
    return _drawn(plot, PAPER, format="png", dpi=200)


def to_svg(plot: Plot) -> str:
    """Draw as an SVG element to stand inside a page, in the page's colours.

    The same report gives the same text. No identifier occurs in the SVG of another plot, and
    nothing in it refers to anything outside.
    """
    from xml.sax.saxutils import escape

    text = _drawn(plot, PAGE, format="svg", transparent=True, metadata={"Date": None}).decode()
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


def _drawn(plot: Plot, theme: Theme, **how: Any) -> bytes:
    import matplotlib

    file = io.BytesIO()
    settings: Any = theme.settings
    with matplotlib.rc_context(settings):
        plot.draw(theme).savefig(file, **how)
    return file.getvalue()
