"""The findings of `hfslim inspect --against`: the differences between two models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from hfslim.inspection import Changes, UnitAgreement
from hfslim.inspection.findings import Finding, table_of

LOST_ROWS = 10
"""Lost examples in the table."""
UNITS_LISTED = 16
"""Units of a site in the table."""
HALF = 0.5
"""Fraction kept of the units in the table."""
TEXT_LENGTH = 60
"""Characters of an example's text in the table."""


@dataclass(frozen=True)
class Agreement(Finding):
    """The agreement with another scoring of the units."""

    source: str
    kinds: Sequence[UnitAgreement]

    def print(self, console: Console) -> None:
        """Print the agreement of each kind, and the units that both keep."""
        kept = list(self.kinds[0].shared)
        table = table_of(
            f"Units on which {self.source} agrees",
            *("units", "#rank correlation"),
            *(f"#in common of the best {fraction:.0%}" for fraction in kept),
        )
        for one in self.kinds:
            shared = (f"{one.shared[fraction]:.0%}" for fraction in kept)
            table.add_row(one.kind, f"{one.rank_correlation:.2f}", *shared)
        console.print(table)
        chance = ", ".join(f"{fraction:.0%}" for fraction in kept)
        console.print(f"By chance they would have {chance} in common.")
        table = table_of(
            f"Units of the best {HALF:.0%} that both keep", "units", "layer", "both keep"
        )
        for one in self.kinds:
            for path, units in one.kept_by_both[HALF].items():
                table.add_row(one.kind, escape(path), _listed(units))
        console.print(table)

    def values(self) -> dict[str, Any]:
        """Return the agreement by kind and site, and the units that both keep."""
        rows = [
            asdict(one)
            | {
                "rank_correlation": _finite(one.rank_correlation),
                "by_site": {path: _finite(value) for path, value in one.by_site.items()},
            }
            for one in self.kinds
        ]
        return {"against": self.source, "agreement": rows}


@dataclass(frozen=True)
class PredictionChanges(Finding):
    """The predictions that changed from another model."""

    source: str
    changes: Changes
    texts: Mapping[int, str]

    def print(self, console: Console) -> None:
        """Print the counts of each class, and the lost examples of the highest confidence."""
        changed = len(self.changes.changes)
        table = table_of(
            f"Predictions that changed from {self.source}: {changed:,} of "
            f"{self.changes.examples:,} examples",
            *("class", "#examples", "#right before"),
            *("#now", "#lost", "#gained", "#wrong otherwise"),
        )
        for one in self.changes.classes:
            name, *counts = asdict(one).values()
            table.add_row(escape(name), *map(str, counts))
        console.print(table)
        lost = [one for one in self.changes.changes if one.outcome == "lost"]
        if not lost:
            return
        rows = table_of(
            f"Lost, the surest first, {min(LOST_ROWS, len(lost))} of {len(lost)}",
            *("#example", "class, as before", "#sure", "now", "#sure"),
            *(["text"] if self.texts else []),
        )
        for change in lost[:LOST_ROWS]:
            text = " ".join(self.texts.get(change.example, "").split())
            rows.add_row(
                str(change.example),
                escape(change.label),
                f"{change.confidence_before:.0%}",
                escape(change.after),
                f"{change.confidence_after:.0%}",
                *([escape(text[:TEXT_LENGTH])] if self.texts else []),
            )
        console.print(rows)

    def values(self) -> dict[str, Any]:
        """Return the changes and the counts of each class."""
        changes = [
            asdict(one) | ({"text": self.texts[one.example]} if self.texts else {})
            for one in self.changes.changes
        ]
        classes = [asdict(one) for one in self.changes.classes]
        values = {"examples": self.changes.examples, "classes": classes, "changed": changes}
        return {"against": self.source, "predictions": values}


def _listed(units: Sequence[int]) -> str:
    listed = ", ".join(map(str, units[:UNITS_LISTED]))
    more = len(units) - UNITS_LISTED
    return f"{listed} and {more:,} more" if more > 0 else listed or "none"


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value
