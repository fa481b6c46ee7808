"""The statistics of a figure over several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, Literal

__all__ = ["SeedStatistics"]


@dataclass(frozen=True)
class SeedStatistics:
    """The values of one figure in the runs of several seeds, and their statistics.

    Attributes:
        figure: The name of the figure.
        values: One value for each seed.
        seeds: The seeds, in the same order.
        better: Whether high or low values are better.
        decimals: Number of decimals to show.

    Examples:
        >>> accuracy = SeedStatistics("accuracy", (0.9, 0.8, 0.7), (42, 43, 44), "high")
        >>> accuracy.cells()
        ('accuracy', '0.8000', '0.1000', '0.7000', '44')
    """

    figure: str
    values: Sequence[float]
    seeds: Sequence[int]
    better: Literal["high", "low"]
    decimals: int = 4

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return fmean(self.values)

    @property
    def std(self) -> float | None:
        """The standard deviation of the sample, over n − 1; None for a single seed."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def worst_seed(self) -> int:
        """The seed of the worst value."""
        return self.seeds[self.values.index(self.worst)]

    @property
    def worst(self) -> float:
        """The worst value."""
        return (min if self.better == "high" else max)(self.values)

    def cells(self) -> tuple[str, str, str, str, str]:
        """Return figure, mean, standard deviation, worst value and worst seed as text."""
        spread = "-" if self.std is None else self._text(self.std)
        worst = (self._text(self.worst), str(self.worst_seed))
        return (self.figure, self._text(self.mean), spread, *worst)

    def by_seed(self) -> tuple[str, ...]:
        """Return the value of each seed as text."""
        return tuple(map(self._text, self.values))

    def _text(self, value: float) -> str:
        return f"{value:z.{self.decimals}f}"

    def to_dict(self) -> dict[str, Any]:
        """Return fields and statistics as plain values, ready for JSON."""
        derived = ("mean", "std", "worst", "worst_seed")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SeedStatistics:
        """Rebuild the statistics from `to_dict`."""
        seeds = tuple(values["seeds"])
        rest = (values["better"], values.get("decimals", 4))
        return cls(values["figure"], tuple(values["values"]), seeds, *rest)
