"""The units of a model that are kept, as a value that all rooms share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

Kind = Literal["heads", "neurons", "channels", "experts", "layers", "dimensions"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Key = tuple[Kind, str]
"""Kind and module path of a site."""


@dataclass(frozen=True, order=True)
class Entry:
    """The units kept at one site.

    Attributes:
        kind: What the units are.
        path: Module path of the site, as `find_units` names it.
        kept: Indices of the kept units, ascending.
        total: Number of units the site has.
    """

    kind: Kind
    path: str
    kept: tuple[int, ...]
    total: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of unit {self.kind!r}: expected one of {list(KINDS)}")
        if list(self.kept) != sorted(set(self.kept)):
            raise ValueError(f"{self.path}: kept {self.kind} must be unique and ascending")
        if self.kept and not 0 <= self.kept[0] <= self.kept[-1] < self.total:
            raise ValueError(
                f"{self.path}: kept {self.kind} must lie in [0, {self.total}), "
                f"got {self.kept[0]} to {self.kept[-1]}"
            )


@dataclass(frozen=True)
class Structure:
    """The kept units of a model, site by site: hashable, comparable and serialisable.

    Indices count the units of the model that the structure was made for. `shrink` renumbers the
    kept units from zero.

    Examples:
        >>> s = Structure.of({"heads": {"encoder.0.attention": ((0, 2), 4)}})
        >>> s.kept("heads", "encoder.0.attention")
        (0, 2)
        >>> s == Structure.from_dict(s.to_dict())
        True
    """

    entries: tuple[Entry, ...]
    _by_site: dict[Key, Entry] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(sorted(self.entries)))
        object.__setattr__(self, "_by_site", {(e.kind, e.path): e for e in self.entries})
        if len(self._by_site) != len(self.entries):
            raise ValueError("a structure names each site once")

    @classmethod
    def of(cls, sites: Mapping[Kind, Mapping[str, tuple[Iterable[int], int]]]) -> Structure:
        """Build a structure from `{kind: {path: (kept indices, total)}}`."""
        return cls(
            tuple(
                Entry(kind, path, tuple(sorted(int(i) for i in kept)), int(total))
                for kind, by_path in sites.items()
                for path, (kept, total) in by_path.items()
            )
        )

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def kept(self, kind: Kind, path: str) -> tuple[int, ...]:
        """Return the kept indices at a site.

        Raises:
            KeyError: The structure does not know the site.
        """
        try:
            return self._by_site[kind, path].kept
        except KeyError:
            raise KeyError(f"no {kind} at {path!r} in this structure") from None

    def has(self, kind: Kind) -> bool:
        """Return whether the structure names a site of a kind."""
        return any(entry.kind == kind for entry in self.entries)

    def within(self, other: Structure) -> bool:
        """Return whether `other` keeps every unit that is kept here."""
        return all(
            (mine := self._by_site.get(key)) is not None and set(mine.kept) <= set(theirs.kept)
            for key, theirs in other._by_site.items()
        )

    @property
    def is_full(self) -> bool:
        """Whether nothing is removed."""
        return all(len(e.kept) == e.total for e in self.entries)

    def to_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return a JSON-ready dictionary; `from_dict` is its inverse."""
        result: dict[str, dict[str, dict[str, Any]]] = {}
        for e in self.entries:
            result.setdefault(e.kind, {})[e.path] = {"kept": list(e.kept), "total": e.total}
        return result

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Structure:
        """Rebuild a structure from `to_dict`'s result."""
        return cls.of(
            {
                kind: {path: (site["kept"], site["total"]) for path, site in by_path.items()}
                for kind, by_path in cast(Mapping[Kind, Any], data).items()
            }
        )

    def digest(self) -> str:
        """Return a short hash that is equal on every rank exactly if the structures are."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def table(self) -> list[dict[str, Any]]:
        """Return one row per site: kind, path, number kept, total."""
        return [
            {"kind": e.kind, "path": e.path, "kept": len(e.kept), "total": e.total}
            for e in self.entries
        ]

    def counts(self) -> dict[Kind, tuple[int, int]]:
        """Return the number of kept units and of all units, by kind."""
        kinds = {e.kind for e in self.entries}
        return {
            kind: (
                sum(len(e.kept) for e in self.entries if e.kind == kind),
                sum(e.total for e in self.entries if e.kind == kind),
            )
            for kind in KINDS
            if kind in kinds
        }

    def __str__(self) -> str:
        parts = [f"{kept}/{total} {kind}" for kind, (kept, total) in self.counts().items()]
        return ", ".join(parts) or "no units"
