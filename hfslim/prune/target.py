"""What a pruned model is to cost: one of macs, parameters, latency, or sparsity by kind of unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard, get_args

from hfslim.structure import KINDS, Kind

Resource = Literal["macs", "parameters", "latency"]
RESOURCES: tuple[Resource, ...] = get_args(Resource)


class UnreachableTargetError(ValueError):
    """The target is below what is left when everything that may go is gone."""


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


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
