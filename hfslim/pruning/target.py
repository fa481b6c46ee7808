"""What a pruned model is to cost: one of macs, parameters, latency, or sparsity by kind of unit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard, get_args

from hfslim.anatomy.structure import KINDS, Kind
from hfslim.anatomy.units import Units

Resource = Literal["macs", "parameters", "latency"]
RESOURCES: tuple[Resource, ...] = get_args(Resource)


class UnreachableTargetError(ValueError):
    """The target is below what is left when everything that may go is gone.

    Attributes:
        least: The smallest fraction to keep that can be reached, of a budget.
    """

    least: float = 1.0


@dataclass(frozen=True)
class Target:
    """A target as users write it: `{"macs": 0.5}`, `{"sparsity": {"heads": 0.3}}`.

    Attributes:
        resource: `macs`, `parameters`, `latency` or `sparsity`.
        kept: Fraction of the whole model's figure that is kept, in (0, 1]; 1 for `sparsity`.
        sparsity: Fraction of the units of each kind that is removed, in [0, 1); those that go with
            their layer count.
    """

    resource: Resource | Literal["sparsity"]
    kept: float = 1.0
    sparsity: Mapping[Kind, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, target: Mapping[str, Any], kinds: Iterable[Kind]) -> Target:
        """Check a target against the kinds of units that may be removed.

        Raises:
            ValueError: It does not name exactly one resource, or a figure is out of range.
        """
        names = (*RESOURCES, "sparsity")
        if not isinstance(target, Mapping) or len(target) != 1 or next(iter(target)) not in names:
            raise ValueError(f"target must be a dict with one of {list(names)}, got {target!r}")
        resource: Any = next(iter(target))
        value: Any = target[resource]
        kinds = tuple(kinds)
        if resource != "sparsity":
            if _is_number(value) and 0 < value <= 1:
                return cls(resource, float(value))
            raise ValueError(f"target {resource} is the fraction to keep, in (0, 1]; got {value!r}")
        by_kind = dict(value) if isinstance(value, Mapping) else dict.fromkeys(kinds, value)
        for kind, fraction in by_kind.items():
            if kind not in KINDS:
                raise ValueError(f"target sparsity: unknown kind {kind!r}, expected {list(kinds)}")
            if kind not in kinds:
                raise ValueError(f"target sparsity names {kind}, which units={list(kinds)} do not")
            if not _is_number(fraction) or not 0 <= fraction < 1:
                raise ValueError(
                    f"target sparsity of {kind} is the fraction to remove, in [0, 1); "
                    f"got {fraction!r}"
                )
        return cls("sparsity", 1.0, {kind: float(f) for kind, f in by_kind.items()})

    def at(self, progress: float) -> Target:
        """Return the target part of the way, from nothing removed at 0 to the whole at 1."""
        return Target(
            self.resource,
            1 - (1 - self.kept) * progress,
            {kind: fraction * progress for kind, fraction in self.sparsity.items()},
        )


@dataclass(frozen=True)
class Goal:
    """What pruning is asked for: one target, several, or a drop of a metric.

    Attributes:
        targets: The targets to reach; for a drop of a metric, the whole of the resource.
    """

    targets: tuple[Target, ...]

    @classmethod
    def parse(
        cls,
        target: Mapping[str, Any] | None,
        max_metric_drop: float | None,
        family: Sequence[float] | None,
        resource: Resource | None,
        evaluated: bool,
        kinds: Iterable[Kind],
    ) -> Goal:
        """Check that exactly one thing is asked for, with what belongs to it.

        Raises:
            ValueError: It is not, or a figure is out of range.
        """
        asked = {"target": target, "max_metric_drop": max_metric_drop, "family": family}
        given = [name for name, value in asked.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"give one of {list(asked)}, got {given or 'none'}: `target` for a cut of known "
                "cost, `max_metric_drop` for the smallest cut that is good enough, `family` for "
                "several"
            )
        if target is not None:
            if resource is not None:
                raise ValueError(
                    f"resource={resource!r} is for `max_metric_drop` and `family`; a target names "
                    f"its own: target={dict(target)}"
                )
            if evaluated:
                raise ValueError("evaluate is for `max_metric_drop` and `family`, not for a target")
            return cls((Target.parse(target, kinds),))
        resource = resource or "macs"
        if resource not in RESOURCES:
            raise ValueError(f"resource must be one of {list(RESOURCES)}, got {resource!r}")
        if family is not None:
            if isinstance(family, str | Mapping) or not isinstance(family, Sequence) or not family:
                raise ValueError(
                    f"family is a list of fractions to keep, such as [0.75, 0.5]; got {family!r}"
                )
            return cls(tuple(Target.parse({resource: kept}, kinds) for kept in family))
        if not _is_number(max_metric_drop) or not 0 <= max_metric_drop < math.inf:
            raise ValueError(f"max_metric_drop must be 0 or more, got {max_metric_drop!r}")
        if not evaluated:
            raise ValueError(
                "max_metric_drop needs evaluate, a function that returns a metric of a model, "
                "higher is better"
            )
        return cls((Target(resource),))

    def at(self, kept: float) -> Target:
        """Return the target that keeps some fraction of the resource."""
        return Target(self.targets[0].resource, kept)


def unreachable(target: Target, units: Units, least: float) -> UnreachableTargetError:
    """Say that a target cannot be reached, and the fraction that can."""
    least = math.ceil(1e4 * least) / 1e4
    error = UnreachableTargetError(
        f"target {target.resource}={target.kept:g} cannot be reached: without any of the "
        f"{sorted({s.kind for s in units})} that may go, {least:.4f} of the {target.resource} "
        f"{'is' if target.resource == 'latency' else 'are'} left; raise the target or add kinds to "
        "`units`"
    )
    error.least = least
    return error


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
