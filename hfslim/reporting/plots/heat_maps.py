"""Heat maps: the importance of units, in all and by class, and the similarity of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hfslim.anatomy.structure import KINDS, Key, Kind
from hfslim.reporting.layer_names import short_names
from hfslim.reporting.plots.style import WIDTH, Theme, label_rows, save, stacked_axes
from hfslim.reporting.unit_rows import COLUMNS, means_of_neighbours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    *("HeatMap", "check_picture", "class_map", "draw_heat_maps", "heat_map_figure"),
    *("importance_map", "importance_maps", "similarity_map"),
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
        highest: The value of the last colour, where 0 has the first.
        colours: A colour map of matplotlib.
        gamma: The power of a value, as a fraction of `highest`, that its colour shows.
        ticks: Labels of the colour bar by value; numbers if None.
    """

    title: str
    values: Any
    rows: Sequence[str]
    columns: Sequence[str] = ()
    highest: float = 1.0
    colours: str = "cividis"
    gamma: float = 1.0
    ticks: Mapping[float, str] | None = None


def check_picture(path: Path) -> None:
    """Check before the work that a picture can be written to a path.

    Raises:
        ValueError: The suffix is not one of `SUFFIXES`, or the folder does not exist.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"picture {str(path)!r}: the name must end in one of {list(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"picture {str(path)!r}: there is no folder {str(path.parent)!r}")


def importance_map(title: str, rows: Mapping[str, Any]) -> HeatMap:
    """Return a map of importance by path, `[units]`, relative to the greatest."""
    labels, pattern = short_names(list(rows))
    grid = np.full((len(rows), max(map(len, rows.values()))), np.nan)
    for line, values in enumerate(rows.values()):
        grid[line, : len(values)] = values
    shares = np.clip(grid / max(float(np.nanmax(grid)), 1e-300), 0, None)
    ticks = {0.0: "0", 0.25: "¼", 1.0: "max"}
    # Most units have little importance: the square root keeps them apart.
    return HeatMap(f"{title}{pattern}", shares, labels, gamma=0.5, ticks=ticks)


def importance_maps(scores: Mapping[Key, torch.Tensor]) -> list[HeatMap]:
    """Return one map for each kind from the importance by kind and path, `[units]`.

    Layers of more than 96 units show the means of neighbours.
    """
    maps = []
    for kind in KINDS:
        rows = {path: values for (k, path), values in scores.items() if k == kind}
        if rows:
            total = sum(map(len, rows.values()))
            cells = {p: means_of_neighbours(v.double(), COLUMNS) for p, v in rows.items()}
            maps.append(importance_map(f"importance of {total:,} {kind}", cells))
    return maps


def class_map(kind: Kind, shares: Mapping[Key, torch.Tensor], classes: Sequence[str]) -> HeatMap:
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


def similarity_map(cka: torch.Tensor) -> HeatMap:
    """Return a map of the similarity of layers, `[layers, layers]`."""
    numbers = [str(number) for number in range(len(cka))]
    rows = [f"layer {number}" for number in numbers]
    return HeatMap("similarity of layers, linear CKA", cka, rows, numbers)


def draw_heat_maps(maps: Sequence[HeatMap], path: Path, title: str) -> None:
    """Draw heat maps below one another into a .svg, .png or .pdf file."""

    def draw(theme: Theme) -> Figure:
        figure = heat_map_figure(maps, 2 * WIDTH)
        figure.suptitle(title, fontsize=9)
        return figure

    save(draw, path)


def heat_map_figure(maps: Sequence[HeatMap], width: float = WIDTH) -> Figure:
    """Return a figure of heat maps below one another, `width` inches wide."""
    from matplotlib.colors import PowerNorm

    figure, places = stacked_axes([len(one.rows) for one in maps], width)
    for axes, one in zip(places, maps, strict=True):
        label_rows(axes, one.rows, one.title, width)
        step = max(1, len(one.columns) // 48)
        axes.set_xticks(range(0, len(one.columns), step), one.columns[::step], fontsize=6.5)
        style = {"norm": PowerNorm(one.gamma, 0, one.highest), "cmap": one.colours}
        image = axes.imshow(np.asarray(one.values), aspect="auto", interpolation="nearest", **style)
        bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.06)
        if one.ticks:
            bar.set_ticks(list(one.ticks), labels=list(one.ticks.values()))
        bar.ax.tick_params(labelsize=6.5)
        bar.outline.set_visible(False)
    return figure
