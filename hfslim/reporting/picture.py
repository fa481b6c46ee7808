"""A picture of what is left of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_structure", "natural", "short_names"]

ROW, GAP, BAR, TEXT, COUNT = 30, 40, 300, 22, 150
KEPT, REMOVED, INK = "#2563eb", "#e2e8f0", "#0f172a"


def natural(path: str) -> list[tuple[int, str]]:
    """Return a sort key that puts `layer.2` before `layer.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def draw_structure(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw one panel for each kind of unit, with one bar for each place that has such units.

    Args:
        rows: `{"kind", "path", "kept", "total"}`, as `Structure.table` gives them.
        path: PNG file to write.

    Raises:
        ValueError: There is no row.
    """
    if not rows:
        raise ValueError("no rows were given, expected those of Structure.table()")
    font = ImageFont.load_default(size=TEXT)
    panels = [
        _Panel(kind, [row for row in rows if row["kind"] == kind], font)
        for kind in dict.fromkeys(row["kind"] for row in rows)
    ]
    width = sum(panel.width + GAP for panel in panels) + GAP
    height = max(panel.height for panel in panels) + 2 * GAP
    image = Image.new("RGB", (width, height), "white")
    left = GAP
    for panel in panels:
        panel.draw(ImageDraw.Draw(image), left, GAP)
        left += panel.width + GAP
    image.quantize(32).save(path, optimize=True)


class _Panel:
    """The bars of one kind of unit, under a title that holds what their names share."""

    def __init__(self, kind: str, rows: Sequence[Mapping[str, Any]], font: Any) -> None:
        self.font = font
        self.rows = sorted(rows, key=lambda row: natural(row["path"]))
        self.labels, pattern = short_names([row["path"] for row in self.rows])
        self.title = f"{kind}{pattern}"
        self.name_width = max(int(font.getlength(label)) for label in self.labels) + 16
        bars = self.name_width + BAR + COUNT
        self.width = max(bars, int(font.getlength(self.title)))
        self.height = ROW * (len(self.rows) + 1)

    def draw(self, draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
        """Draw the panel at a place of an image."""
        draw.text((left, top), self.title, INK, self.font)
        start = left + self.name_width
        for number, (label, row) in enumerate(zip(self.labels, self.rows, strict=True), 1):
            y = top + ROW * number
            draw.text((start - 16, y), label, INK, self.font, anchor="ra")
            share = row["kept"] / row["total"] if row["total"] else 0.0
            draw.rectangle((start, y + 2, start + BAR, y + ROW - 8), fill=REMOVED)
            if share:
                draw.rectangle((start, y + 2, start + max(BAR * share, 2), y + ROW - 8), fill=KEPT)
            count = f"{row['kept']:,} / {row['total']:,}"
            draw.text((start + BAR + 12, y), count, INK, self.font)


def short_names(paths: Sequence[str]) -> tuple[list[str], str]:
    """Return what tells paths apart, and ` in ` their common pattern with `*` in its place."""
    parts = [path.split(".") for path in paths]
    if len(paths) == 1:
        return list(paths), ""
    room = min(map(len, parts)) - 1
    lead = _common(parts, room)
    tail = _common([part[::-1] for part in parts], room - lead)
    pattern = ".".join([*parts[0][:lead], "*", *parts[0][len(parts[0]) - tail :]])
    return [".".join(part[lead : len(part) - tail]) for part in parts], f" in {pattern}"


def _common(parts: Sequence[Sequence[str]], most: int) -> int:
    """Count the leading parts, up to `most`, that are the same in all."""
    count = 0
    while count < most and len({part[count] for part in parts}) == 1:
        count += 1
    return count
