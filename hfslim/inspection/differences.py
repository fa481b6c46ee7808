"""What `hfslim inspect --against` found: how a model differs from another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from hfslim.inspection import Changes, UnitAgreement
from hfslim.inspection.findings import table_of
from hfslim.reporting.plots import heat_maps

TOLD = 10
"""Lost examples that are told one by one."""
NAMED = 16
"""Units of a place that are named."""
HALF = 0.5
"""Fraction of the units of a kind of which it is told which both keep."""
TEXT = 60
"""Characters of a text."""


@dataclass(frozen=True)
class Agreement:
    """Which units another model, or another scoring, finds important too."""

    source: str
    kinds: Sequence[UnitAgreement]

    def print(self, console: Console) -> None:
        """Print a row for each kind, and the units on which the two agree."""
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
            {
                "kind": one.kind,
                "rank_correlation": _finite(one.rank_correlation),
                "by_site": {path: _finite(value) for path, value in one.by_site.items()},
                "shared": {str(fraction): value for fraction, value in one.shared.items()},
                "kept_by_both": {str(f): dict(sites) for f, sites in one.kept_by_both.items()},
            }
            for one in self.kinds
        ]
        return {"against": self.source, "agreement": rows}

    def panels(self) -> list[heat_maps.HeatMap]:
        """Return none: a few numbers are better read."""
        return []


@dataclass(frozen=True)
class Lost:
    """What became of the predictions of another model."""

    source: str
    changes: Changes
    texts: Mapping[int, str]

    def print(self, console: Console) -> None:
        """Print a row for each class, and the losses of which the model is surest."""
        changed = len(self.changes.changes)
        table = table_of(
            f"Predictions that changed from {self.source}: {changed:,} of "
            f"{self.changes.examples:,} examples",
            *(
                "class",
                "#examples",
                "#right before",
                "#now",
                "#lost",
                "#gained",
                "#wrong otherwise",
            ),
        )
        for one in self.changes.classes:
            cells = (
                one.examples,
                one.right_before,
                one.right_after,
                one.lost,
                one.gained,
                one.other,
            )
            table.add_row(escape(one.name), *map(str, cells))
        console.print(table)
        lost = [one for one in self.changes.changes if one.outcome == "lost"]
        if not lost:
            return
        rows = table_of(
            f"Lost, the surest first, {min(TOLD, len(lost))} of {len(lost)}",
            *("#example", "class, as before", "#sure", "now", "#sure"),
            *(["text"] if self.texts else []),
        )
        for change in lost[:TOLD]:
            text = " ".join(self.texts.get(change.example, "").split())
            rows.add_row(
                str(change.example),
                escape(change.label),
                f"{change.confidence_before:.0%}",
                escape(change.after),
                f"{change.confidence_after:.0%}",
                *([escape(text[:TEXT])] if self.texts else []),
            )
        console.print(rows)

    def values(self) -> dict[str, Any]:
        """Return every change, and the classes."""
        changes = [
            asdict(one) | ({"text": self.texts[one.example]} if self.texts else {})
            for one in self.changes.changes
        ]
        classes = [asdict(one) for one in self.changes.classes]
        told = {"examples": self.changes.examples, "classes": classes, "changed": changes}
        return {"against": self.source, "predictions": told}

    def panels(self) -> list[heat_maps.HeatMap]:
        """Return none."""
        return []


def _listed(units: Sequence[int]) -> str:
    told = ", ".join(map(str, units[:NAMED]))
    more = len(units) - NAMED
    return f"{told} and {more:,} more" if more > 0 else told or "none"


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value
