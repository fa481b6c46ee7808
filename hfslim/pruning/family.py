"""Cut copies of one model to several targets, and measure what each costs and keeps."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Unpack

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from hfslim.anatomy.structure import Structure
from hfslim.measuring.measurement import compare
from hfslim.pruning.metric_drop import Evaluate, metric_of
from hfslim.pruning.oneshot import PruneOptions, calibrated_search
from hfslim.pruning.steps import cut_copy, decide
from hfslim.pruning.target import Resource, Target
from hfslim.training.ranks import from_first_rank

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """The cost of one cut, as fractions of the whole model's figures, and its metric.

    Attributes:
        macs: Multiply-accumulates.
        parameters: Parameters.
        latency: Median time of a call, both models' calls timed in turn.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
        metric: The result of `evaluate`; None without it.
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
        point: Its cost and its metric.
    """

    kept: float
    structure: Structure
    model: PreTrainedModel = field(repr=False)
    point: Point


@dataclass(frozen=True)
class PruneFamily:
    """Several cuts of one model from one scoring, in the order asked for.

    Attributes:
        resource: The resource that the fractions are of.
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
        """Return one row per cut: the fraction asked for, and the figures of its `Point`."""
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


def prune_family(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    fractions: Sequence[float],
    resource: Resource = "macs",
    evaluate: Evaluate | None = None,
    **options: Unpack[PruneOptions],
) -> PruneFamily:
    """Cut copies of a trained classifier to several targets, from one scoring.

    The model stays whole; all members are in memory at once.

    Args:
        model: The classifier; not a wrapper around it.
        data: Batches of model inputs, as for `prune`.
        fractions: Fractions of the resource to keep, such as `[0.75, 0.5, 0.25]`.
        resource: `macs`, `parameters` or `latency`.
        evaluate: Returns a metric of a model, higher is better.
        **options: `units`, `criterion`, `inputs` and the further arguments of `prune`.

    Returns:
        The members, each equal to the result of `prune` at its fraction, with their costs.

    Raises:
        UnreachableTargetError: A fraction is below what can be reached; the message gives the
            nearest that can.
        ValueError: An argument is wrong or conflicts with another, the data is empty, or scores or
            a metric are not finite.
    """
    if isinstance(fractions, str) or not isinstance(fractions, Sequence) or not fractions:
        raise ValueError(
            f"fractions is a list of fractions to keep, such as [0.75, 0.5]; got {fractions!r}"
        )
    targets = [Target.of(resource, kept) for kept in fractions]
    least = min(targets, key=lambda target: target.kept)
    search, calibration = calibrated_search(model, data, least, **options)
    members = []
    for target in targets:
        structure, _ = decide(replace(search, target=target), calibration.scores)
        small = cut_copy(model, structure, calibration)
        metric = metric_of(small, evaluate) if evaluate else None
        point = measured_point(model, small, search.inputs, metric)
        members.append(Member(target.kept, structure, small, point))
        logger.info("keeps %g of the %s: %s", target.kept, resource, point)
    whole = metric_of(model, evaluate) if evaluate else None
    return PruneFamily(resource, whole, tuple(members))


def measured_point(
    whole: nn.Module,
    small: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    metric: float | None = None,
) -> Point:
    """Measure a cut model against the whole one, on the first rank for all."""

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
