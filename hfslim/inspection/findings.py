"""The findings of `hfslim inspect`, as tables, plain values and panels of a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from hfslim.anatomy.structure import KINDS, Kind
from hfslim.reporting.plots import heat_maps
from hfslim.reporting.unit_rows import means_of_neighbours

if TYPE_CHECKING:
    from hfslim.anatomy.structure import Key
    from hfslim.anatomy.units import Units
    from hfslim.pruning.scores.by_class import ClassImportance

BARS = "▁▂▃▄▅▆▇█"
BAR_COLUMNS = 24


class Finding(Protocol):
    """One result of an inspection."""

    def print(self, console: Console) -> None:
        """Print tables."""

    def values(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""

    def panels(self) -> list[heat_maps.HeatMap]:
        """Return the panels of a picture; none by default."""
        return []


@dataclass(frozen=True)
class Importance(Finding):
    """The importance of each unit for the whole task."""

    title: str
    units: Units
    scores: Mapping[Key, Tensor]

    def print(self, console: Console) -> None:
        """Print a row for each site."""
        table = table_of(
            self.title, "units", "layer", "#number", "#share", "importance", "least important"
        )
        bars = {
            key: means_of_neighbours(values, BAR_COLUMNS) for key, values in self.scores.items()
        }
        totals, highest = dict[str, float](), dict[str, float]()
        for (kind, path), values in self.scores.items():
            totals[kind] = totals.get(kind, 0.0) + values.sum().item()
            highest[kind] = max(highest.get(kind, 0.0), bars[kind, path].max().item())
        for site in self.units:
            values = self.scores[site.key]
            share = values.sum().item() / totals[site.kind] if totals[site.kind] else 0.0
            least = [i for i in values.argsort(stable=True).tolist() if i not in site.fixed][:3]
            table.add_row(
                site.kind,
                escape(site.path),
                str(site.size),
                f"{share:.1%}",
                _bars(bars[site.key], highest[site.kind]),
                ", ".join(map(str, least)),
            )
        for refusal in self.units.refusals:
            table.add_row(refusal.kind, escape(refusal.path), "–", "–", escape(refusal.reason), "")
        console.print(table)

    def values(self) -> dict[str, Any]:
        """Return the scores by site, and the refusals."""
        rows = [
            {
                "kind": site.kind,
                "path": site.path,
                "units": site.size,
                "fixed": list(site.fixed),
                "scores": self.scores[site.key].tolist(),
            }
            for site in self.units
        ]
        return {"units": rows, "refused": [vars(refusal) for refusal in self.units.refusals]}

    def panels(self) -> list[heat_maps.HeatMap]:
        """Return a panel for each kind."""
        return heat_maps.importance_maps(self.scores)


@dataclass(frozen=True)
class ImportanceByClass(Importance):
    """The importance of each unit for the whole task and for each class."""

    parts: ClassImportance

    def print(self, console: Console) -> None:
        """Print a row for each site, and one for each class."""
        super().print(console)
        kinds = self._kinds
        table = table_of(
            "What each class needs more than the others, as place: unit (times its share for all)",
            *("class", "#examples", "#share", *kinds),
        )
        sums = torch.stack([values.sum(1) for values in self.parts.by_class.values()]).sum(0)
        share = sums / sums.sum().clamp_min(1e-300)
        standing = {kind: standing_out(self.parts.shares(kind)) for kind in kinds}
        for number, name in enumerate(self.parts.classes):
            table.add_row(
                escape(name),
                str(self.parts.examples[number].item()),
                f"{share[number]:.1%}",
                *(", ".join(standing[kind][number]) for kind in kinds),
            )
        console.print(table)

    def values(self) -> dict[str, Any]:
        """Return the scores by site, for all and by class, and the classes."""
        values = super().values()
        for row in values["units"]:
            row["by_class"] = self.parts.by_class[row["kind"], row["path"]].tolist()
        pairs = zip(self.parts.classes, self.parts.examples.tolist(), strict=True)
        return {**values, "classes": [{"name": n, "examples": count} for n, count in pairs]}

    def panels(self) -> list[heat_maps.HeatMap]:
        """Return two panels for each kind."""
        own = [
            heat_maps.class_map(k, self.parts.shares(k), self.parts.classes) for k in self._kinds
        ]
        return super().panels() + own

    @property
    def _kinds(self) -> list[Kind]:
        return [kind for kind in KINDS if any(k == kind for k, _ in self.scores)]


@dataclass(frozen=True)
class Similarity(Finding):
    """The similarity of the layers, `[layers, layers]`."""

    cka: Tensor

    def print(self, console: Console) -> None:
        """Print the matrix in hundredths."""
        console.print("How alike the layers' outputs are, linear CKA in hundredths", style="italic")
        numbers = range(len(self.cka))
        console.print("layer " + " ".join(f"{number:3}" for number in numbers), soft_wrap=True)
        for number in numbers:
            cells = " ".join(f"{100 * value:3.0f}" for value in self.cka[number].tolist())
            console.print(f"{number:5} {cells}", soft_wrap=True, highlight=False)

    def values(self) -> dict[str, Any]:
        """Return the matrix."""
        return {"similarity": self.cka.tolist()}

    def panels(self) -> list[heat_maps.HeatMap]:
        """Return the matrix."""
        return [heat_maps.similarity_map(self.cka)]


def standing_out(shares: Mapping[Key, Tensor], most: int = 2) -> list[list[str]]:
    """Return, by class, the units whose share of the importance exceeds that for all the most.

    Args:
        shares: `[1 + classes, units]` by kind and site, all examples first.
        most: The maximal number of units for each class.

    Returns:
        For each class texts such as `3: 5 (2.1×)`, for the fourth site's sixth unit.
    """
    flat = torch.cat(list(shares.values()), dim=1)
    places = [
        (s, unit) for s, share in enumerate(shares.values()) for unit in range(share.shape[1])
    ]
    alone = len(shares) == 1
    result = []
    for excess, own in zip(flat[1:] - flat[0], flat[1:], strict=True):
        best = [i for i in excess.argsort(descending=True, stable=True).tolist() if excess[i] > 0]
        result.append(
            [
                (f"{places[i][1]}" if alone else f"{places[i][0]}: {places[i][1]}")
                + f" ({own[i] / flat[0, i].clamp_min(1e-300):.1f}×)"
                for i in best[:most]
            ]
        )
    return result


def table_of(title: str, *headings: str) -> Table:
    """Return an empty table; headings that begin with `#` are right-justified."""
    table = Table(title=escape(title), title_justify="left")
    for heading in headings:
        numbers = heading.startswith("#")
        table.add_column(heading.removeprefix("#"), justify="right" if numbers else "left")
    return table


def _bars(values: Tensor, highest: float) -> str:
    if not highest:
        return BARS[0] * len(values)
    heights = (values / highest * (len(BARS) - 1)).round().int().clamp(0, len(BARS) - 1)
    return "".join(BARS[height] for height in heights)
