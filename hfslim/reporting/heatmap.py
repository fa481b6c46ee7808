"""Heat maps of how much units matter, for all and by class, and of how alike layers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hfslim.anatomy.structure import KINDS, Kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Panel",
    "check_picture",
    "class_panel",
    "draw",
    "importance_panels",
    "means_of_neighbours",
    "similarity_panel",
]

SUFFIXES = (".svg", ".png", ".pdf")
COLUMNS = 96


@dataclass(frozen=True)
class Panel:
    """One map of a picture.

    Attributes:
        title: What stands above it.
        values: Colours, `[rows, columns]`; nan where there is nothing.
        rows: What the rows are.
        columns: What the columns are; not told if empty.
        highest: The value of the last colour, the first is 0's; the greatest value if None.
        colours: A colour map of matplotlib.
    """

    title: str
    values: torch.Tensor
    rows: Sequence[str]
    columns: Sequence[str] = ()
    highest: float | None = None
    colours: str = "viridis"


def check_picture(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before the work for it is done.

    Raises:
        ValueError: The file's name does not end in a known way, or its folder does not exist.
        RuntimeError: matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"picture {str(path)!r}: the name must end in one of {list(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"picture {str(path)!r}: there is no folder {str(path.parent)!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError("a picture needs matplotlib: pip install 'hfslim[plots]'") from error


def means_of_neighbours(values: torch.Tensor, most: int) -> torch.Tensor:
    """Return values, `[units]`, or where they are more than `most`, the means of neighbours."""
    parts = values.tensor_split(max(min(most, len(values)), 1))
    return torch.stack([part.mean() for part in parts]) if len(values) else values


def importance_panels(scores: Mapping[tuple[Kind, str], torch.Tensor]) -> list[Panel]:
    """Show the importance of every unit: one panel for each kind, one row for each place.

    Places with more than 96 units show the means of neighbours. Colours start at zero and end at
    the greatest of the kind.

    Args:
        scores: Importance by kind and path, `[units]`.
    """
    panels = []
    for kind in KINDS:
        rows = {path: values for (k, path), values in scores.items() if k == kind}
        if not rows:
            continue
        columns = min(COLUMNS, max(len(values) for values in rows.values()))
        grid = torch.full((len(rows), columns), float("nan"), dtype=torch.float64)
        for row, values in enumerate(rows.values()):
            means = means_of_neighbours(values.double(), columns)
            grid[row, : len(means)] = means
        total = sum(len(values) for values in rows.values())
        panels.append(Panel(f"{kind}, {total:,}", grid, list(rows)))
    return panels


def class_panel(
    kind: Kind, shares: Mapping[tuple[Kind, str], torch.Tensor], classes: Sequence[str]
) -> Panel:
    """Show how much more or less than all a class needs the units of each place.

    Where there is one place, such as the list of layers, its units are shown one by one.

    Args:
        kind: The kind of unit.
        shares: By kind and path, what all and each class need of each unit, as shares of what they
            need of the kind, `[1 + classes, units]`.
        classes: Their names.
    """
    places = list(shares.values())
    by_place = places[0]
    if len(places) > 1:
        by_place = torch.stack([share.sum(1) for share in places], dim=1)
    ratio = by_place[1:] / by_place[0].clamp_min(1e-300)
    numbers = [str(number) for number in range(ratio.shape[1])]
    title = f"{kind} by class: share of each place beside that for all, 2 for twice or more"
    return Panel(title, ratio, list(classes), numbers, 2.0, "coolwarm")


def similarity_panel(values: torch.Tensor, rows: str = "layer", columns: str = "layer") -> Panel:
    """Show how alike layers are.

    Args:
        values: CKA, `[layers, layers]`.
        rows: What a row is called before its number.
        columns: What a column is called.
    """
    title = "how alike layers are, linear CKA" + (
        f"; columns: {columns}" if columns != rows else ""
    )
    names = [
        [f"{name} {i}" for i in range(n)] for name, n in zip((rows, ""), values.shape, strict=True)
    ]
    return Panel(title, values, names[0], [name.strip() for name in names[1]], 1.0)


def draw(panels: Sequence[Panel], path: Path, title: str) -> None:
    """Draw panels below one another.

    Args:
        panels: One or more.
        path: A .svg, .png or .pdf file.
        title: What stands above.
    """
    figure = _figure(panels)
    figure.suptitle(title)
    for axes, panel in zip(figure.axes, panels, strict=True):
        image = axes.imshow(
            panel.values.numpy(), aspect="auto", vmin=0, vmax=panel.highest, cmap=panel.colours
        )
        axes.set_title(panel.title, loc="left", fontsize=10)
        axes.set_yticks(range(len(panel.rows)), list(panel.rows), fontsize=6)
        axes.set_xticks(range(len(panel.columns)), list(panel.columns), fontsize=6)
        figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=150)


def _figure(panels: Sequence[Panel]) -> Figure:
    from matplotlib.figure import Figure

    heights = [max(len(panel.rows), 2) for panel in panels]
    figure = Figure(figsize=(9, 1.2 * len(heights) + 0.22 * sum(heights)), layout="constrained")
    figure.subplots(len(heights), 1, height_ratios=heights)
    return figure
