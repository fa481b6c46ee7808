"""The target of a cut: macs, parameters or latency to keep, or sparsity by kind of unit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard, get_args

from hfslim.anatomy.structure import KINDS, Kind
from hfslim.anatomy.units import Units

Resource = Literal["macs", "parameters", "latency"]
RESOURCES: tuple[Resource, ...] = get_args(Resource)


class UnreachableTargetError(ValueError):
    """The target is below the cost of the model without any unit that may be removed.

    Attributes:
        least: The smallest fraction that can be kept of a budget.
    """

    least: float = 1.0


@dataclass(frozen=True)
class Target:
    """A target as users write it: `{"macs": 0.5}`, `{"sparsity": {"heads": 0.3}}`.

    Attributes:
        resource: `macs`, `parameters`, `latency` or `sparsity`.
        kept: Fraction of the whole model's figure that is kept, in (0, 1]; 1 for `sparsity`.
        sparsity: Fraction of the units of each kind that is removed, in [0, 1); units of removed
            layers count.
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
            return cls.of(resource, value)
        by_kind = dict(value) if isinstance(value, Mapping) else dict.fromkeys(kinds, value)
        for kind, fraction in by_kind.items():
            if kind not in KINDS:
                raise ValueError(f"target sparsity: unknown kind {kind!r}, expected {list(kinds)}")
            if kind not in kinds:
                raise ValueError(f"target sparsity names {kind}, which units={list(kinds)} do not")
            if not is_number(fraction) or not 0 <= fraction < 1:
                raise ValueError(
                    f"target sparsity of {kind} is the fraction to remove, in [0, 1); "
                    f"got {fraction!r}"
                )
        return cls("sparsity", 1.0, {kind: float(f) for kind, f in by_kind.items()})

    @classmethod
    def of(cls, resource: Resource, kept: float) -> Target:
        """Check a fraction of a resource to keep.

        Raises:
            ValueError: The resource is unknown, or the fraction is out of range.
        """
        if resource not in RESOURCES:
            raise ValueError(f"resource must be one of {list(RESOURCES)}, got {resource!r}")
        if not is_number(kept) or not 0 < kept <= 1:
            raise ValueError(f"target {resource} is the fraction to keep, in (0, 1]; got {kept!r}")
        return cls(resource, float(kept))

    def at(self, progress: float) -> Target:
        """Return the target at a progress from 0, nothing removed, to 1, the target itself."""
        return Target(
            self.resource,
            1 - (1 - self.kept) * progress,
            {kind: fraction * progress for kind, fraction in self.sparsity.items()},
        )


def unreachable(target: Target, units: Units, least: float) -> UnreachableTargetError:
    """Return the error for a target below the least fraction that can be kept."""
    least = math.ceil(1e4 * least) / 1e4
    error = UnreachableTargetError(
        f"target {target.resource}={target.kept:g} cannot be reached: without any of the "
        f"{sorted({s.kind for s in units})} that may go, {least:.4f} of the {target.resource} "
        f"{'is' if target.resource == 'latency' else 'are'} left; raise the target or add kinds to "
        "`units`"
    )
    error.least = least
    return error


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a number and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)
