"""Heat maps: the importance of units, in all and by class, and the similarity of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hfslim.anatomy.structure import KINDS, Kind
from hfslim.reporting.layer_names import short_names
from hfslim.reporting.plots.style import WIDTH, Theme, label_rows, new_figure, save
from hfslim.reporting.unit_rows import COLUMNS, means_of_neighbours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "HeatMap",
    "check_picture",
    "class_map",
    "draw_cells",
    "draw_heat_maps",
    "importance_maps",
    "similarity_map",
]

SUFFIXES = (".svg", ".png", ".pdf")


@dataclass(frozen=True)
class HeatMap:
    """One heat map of a picture.

    Attributes:
        title: The heading above it.
        values: Colours, `[rows, columns]`; nan where there is no cell.
        rows: The names of the rows.
        columns: The names of the columns; without labels if empty.
        highest: The value of the last colour, where 0 has the first; the greatest value if None.
        colours: A colour map of matplotlib.
    """

    title: str
    values: torch.Tensor
    rows: Sequence[str]
    columns: Sequence[str] = ()
    highest: float | None = None
    colours: str = "cividis"


def check_picture(path: Path) -> None:
    """Check before the work that a picture can be written to a path.

    Raises:
        ValueError: The suffix is not one of `SUFFIXES`, or the folder does not exist.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"picture {str(path)!r}: the name must end in one of {list(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"picture {str(path)!r}: there is no folder {str(path.parent)!r}")


def importance_maps(scores: Mapping[tuple[Kind, str], torch.Tensor]) -> list[HeatMap]:
    """Return one map of importance for each kind, with a row for each layer.

    Layers of more than 96 units show the means of neighbours. The last colour is the greatest
    importance of the kind.

    Args:
        scores: Importance by kind and path, `[units]`.
    """
    maps = []
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
        labels, pattern = short_names(list(rows))
        maps.append(HeatMap(f"importance of {total:,} {kind}{pattern}", grid, labels))
    return maps


def class_map(
    kind: Kind, shares: Mapping[tuple[Kind, str], torch.Tensor], classes: Sequence[str]
) -> HeatMap:
    """Return a map of how much more or less important each layer is for a class than for all.

    A single layer, such as the list of layers, is shown unit by unit.

    Args:
        kind: The kind of unit.
        shares: By kind and path, the importance of each unit as a fraction of that of the kind,
            for all examples and for each class, `[1 + classes, units]`.
        classes: The names of the classes.
    """
    layers = list(shares.values())
    by_layer = layers[0]
    if len(layers) > 1:
        by_layer = torch.stack([share.sum(1) for share in layers], dim=1)
    ratio = by_layer[1:] / by_layer[0].clamp_min(1e-300)
    numbers = [str(number) for number in range(ratio.shape[1])]
    title = f"{kind} by class: importance relative to all classes (2: twice or more)"
    return HeatMap(title, ratio, list(classes), numbers, 2.0, "coolwarm")


def similarity_map(values: torch.Tensor) -> HeatMap:
    """Return a map of the similarity of layers.

    Args:
        values: Linear CKA, `[layers, layers]`.
    """
    numbers = [str(number) for number in range(len(values))]
    rows = [f"layer {number}" for number in numbers]
    return HeatMap("similarity of layers, linear CKA", values, rows, numbers, 1.0)


def draw_heat_maps(maps: Sequence[HeatMap], path: Path, title: str) -> None:
    """Draw heat maps below one another into a .svg, .png or .pdf file."""

    def draw(theme: Theme) -> Figure:
        lines = [max(len(one.rows), 2) for one in maps]
        height = 0.3 + 0.17 * sum(lines) + 0.5 * len(lines)
        figure, axes = new_figure(height, len(lines), width=2 * WIDTH, height_ratios=lines)
        figure.suptitle(title, fontsize=9)
        for one, place in zip(maps, axes, strict=True):
            label_rows(place, one.rows, one.title, 2 * WIDTH)
            step = max(1, len(one.columns) // 48)
            place.set_xticks(range(0, len(one.columns), step), one.columns[::step], fontsize=6.5)
            draw_cells(figure, place, one.values, one.highest, one.colours)
        return figure

    save(draw, path)


def draw_cells(
    figure: Figure,
    axes: Any,
    values: Any,
    highest: float | None = None,
    colours: str = "cividis",
    gamma: float = 1.0,
) -> Any:
    """Draw `values`, `[rows, columns]`, as coloured cells, and return their colour bar.

    Args:
        figure: The figure that holds the axes.
        axes: Where to draw.
        values: nan where there is no cell.
        highest: The value of the last colour; the greatest value if None.
        colours: A colour map of matplotlib.
        gamma: The power of a value's share of `highest` that its colour stands for.
    """
    from matplotlib.colors import PowerNorm

    norm = PowerNorm(gamma, vmin=0, vmax=highest)
    image = axes.imshow(values, aspect="auto", norm=norm, cmap=colours, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.06)
    bar.ax.tick_params(labelsize=6.5)
    bar.outline.set_visible(False)
    return bar
