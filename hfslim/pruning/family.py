"""Several cuts of one model, and what each costs and keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from hfslim.anatomy.structure import Structure
from hfslim.measuring.measurement import compare
from hfslim.training.ranks import from_first_rank


@dataclass(frozen=True)
class Point:
    """What one cut costs, as fractions of the whole model's figures, and how good it is.

    Attributes:
        macs: Multiply-accumulates kept.
        parameters: Parameters kept.
        latency: Median time of a call kept, both models' calls timed in turn.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
        metric: What `evaluate` returned; None without it.
    """

    macs: float
    parameters: float
    latency: float
    low: float
    high: float
    metric: float | None = None


@dataclass(frozen=True)
class Member:
    """One cut of a family.

    Attributes:
        kept: Fraction of the resource that was asked for.
        structure: The units kept, by their numbers in the whole model.
        model: A copy of the model, shrunk.
        point: What it costs and how good it is.
    """

    kept: float
    structure: Structure
    model: PreTrainedModel
    point: Point


@dataclass(frozen=True)
class PruneFamily:
    """Several cuts of one model from one scoring, in the order asked for.

    Attributes:
        resource: What the fractions kept are of.
        metric: The whole model's metric; None without `evaluate`.
        members: The cuts.
    """

    resource: str
    metric: float | None
    members: tuple[Member, ...]

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Member:
        return self.members[index]

    def curve(self) -> list[dict[str, Any]]:
        """Return one row per cut: the fraction asked for, and what is told by its `Point`."""
        return [{self.resource + "_asked": m.kept, **asdict(m.point)} for m in self]

    def __str__(self) -> str:
        names = ("macs", "parameters", "latency", "metric")
        table = Table(f"{self.resource} asked for", *names, "units")
        whole = "–" if self.metric is None else f"{self.metric:.4f}"
        table.add_row("1", "1", "1", "1", whole, "all")
        for m in self:
            p = m.point
            latency = f"{p.latency:.3f} ({p.low:.3f}–{p.high:.3f})"
            metric = "–" if p.metric is None else f"{p.metric:.4f}"
            figures = (f"{p.macs:.3f}", f"{p.parameters:.3f}", latency, metric)
            table.add_row(f"{m.kept:g}", *figures, str(m.structure))
        console = Console(width=140)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


def point(
    whole: nn.Module,
    small: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    metric: float | None = None,
) -> Point:
    """Measure a cut model against the whole one; on the first rank, for all."""

    def measured() -> Point:
        found = compare(whole, small, inputs)
        before, after = found.before, found.after
        return Point(
            after.macs / before.macs,
            after.parameters / before.parameters,
            1 / found.speedup,
            1 / found.high,
            1 / found.low,
            metric,
        )

    return from_first_rank(measured)
