"""A heat map of how much each unit of a model matters, through matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hfslim.structure import KINDS, Kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_picture", "draw_importance"]

SUFFIXES = (".svg", ".png", ".pdf")
COLUMNS = 96


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


def draw_importance(
    scores: Mapping[tuple[Kind, str], torch.Tensor], path: Path, title: str
) -> None:
    """Draw the importance of every unit: one panel for each kind, one row for each place.

    Places with more than 96 units show the means of neighbours. Colours start at zero and end at
    the greatest of the kind.

    Args:
        scores: Importance by kind and path, `[units]`.
        path: A .svg, .png or .pdf file.
        title: What stands above.
    """
    by_kind = {
        kind: {p: v for (k, p), v in scores.items() if k == kind}
        for kind in KINDS
        if any(k == kind for k, _ in scores)
    }
    figure = _figure(by_kind)
    figure.suptitle(title)
    for axes, (kind, rows) in zip(figure.axes, by_kind.items(), strict=True):
        columns = min(COLUMNS, max(len(v) for v in rows.values()))
        grid = torch.full((len(rows), columns), float("nan"), dtype=torch.float64)
        for row, values in enumerate(rows.values()):
            parts = values.double().tensor_split(min(columns, len(values)))
            grid[row, : len(parts)] = torch.stack([part.mean() for part in parts])
        image = axes.imshow(grid.numpy(), aspect="auto", vmin=0, cmap="viridis")
        axes.set_title(f"{kind}, {sum(len(v) for v in rows.values()):,}", loc="left")
        axes.set_yticks(range(len(rows)), list(rows), fontsize=6)
        axes.set_xticks([])
        figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=150)


def _figure(by_kind: Mapping[Kind, Mapping[str, torch.Tensor]]) -> Figure:
    from matplotlib.figure import Figure

    heights = [max(len(rows), 2) for rows in by_kind.values()]
    figure = Figure(figsize=(9, 1.2 * len(heights) + 0.22 * sum(heights)), layout="constrained")
    figure.subplots(len(heights), 1, height_ratios=heights)
    return figure
