"""Axes of features that are tied together: their units can only go at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """A run of entries along a dimension: those of an axis, each `inner` entries wide."""

    axis: int
    inner: int = 1


Label = tuple[Segment, ...] | None
"""The runs of entries along a dimension; None where no entry can be cut."""


class Axes:
    """Axes that are tied together, by union and find.

    Each axis is a row of entries. Tied axes share units: unit `i` of one goes with unit `i` of the
    other. Where one has more entries, each of its units has several in a row.
    """

    def __init__(self) -> None:
        self._size: list[int] = []
        self._above: dict[int, tuple[int, int]] = {}
        self._free: set[int] = set()
        self._parts: dict[int, tuple[Segment, ...]] = {}
        self._bound: dict[int, str] = {}

    def new(self, size: int, free: bool = False) -> tuple[Segment, ...]:
        """Return the label of a new axis; a free one may later be split into several in a row."""
        axis = len(self._size)
        self._size.append(size)
        if free:
            self._free.add(axis)
        return (Segment(axis),)

    def units(self, axis: int) -> tuple[int, int]:
        """Return the axis that represents all that are tied to one, and the entries per unit."""
        width = 1
        while axis in self._above:
            axis, entries = self._above[axis]
            width *= entries
        return axis, width

    def size(self, axis: int) -> int:
        """Return the number of entries of an axis."""
        return self._size[axis]

    def reason(self, axis: int) -> str:
        """Return why the units of an axis cannot go; empty if they can."""
        return self._bound.get(self.units(axis)[0], "")

    def resolve(self, label: Label) -> Label:
        """Return a label with axes that were split replaced by their parts."""
        if label is None or not any(one.axis in self._parts for one in label):
            return label
        spelt = (self.resolve(self._parts.get(one.axis, (one,))) or () for one in label)
        return tuple(part for parts in spelt for part in parts)

    def bind(self, labels: Iterable[Label], reason: str) -> None:
        """Note why the units along some dimensions cannot go; the first reason counts."""
        for label in labels:
            for one in self.resolve(label) or ():
                self._free.discard(one.axis)
                self._bound.setdefault(self.units(one.axis)[0], reason)

    def tie(self, one: Label, other: Label) -> None:
        """Tie the axes along two dimensions of the same length."""
        one, other = self.resolve(one), self.resolve(other)
        if one is None or other is None:
            self.bind((one, other), "they meet features that are no channels")
        elif [self._length(s) for s in one] == [self._length(s) for s in other]:
            for a, b in zip(one, other, strict=True):
                self._join(a.axis, b.axis)
        elif self._is_free(one):
            self._split(one[0].axis, other)
        elif self._is_free(other):
            self._split(other[0].axis, one)
        else:
            self.bind((one, other), "they are joined with others in another order")

    def group(self, label: Label, units: tuple[Segment, ...]) -> None:
        """Tie each of some units to a run of entries of a label with one axis."""
        label = self.resolve(label)
        if label is None or len(label) > 1:
            self.bind((label, units), "they are convolved in groups together with others")
        else:
            self._join(units[0].axis, label[0].axis)

    def _length(self, segment: Segment) -> int:
        return self._size[segment.axis] * segment.inner

    def _is_free(self, label: tuple[Segment, ...]) -> bool:
        return len(label) == 1 and label[0].axis in self._free and label[0].inner == 1

    def _split(self, axis: int, parts: tuple[Segment, ...]) -> None:
        self._free.discard(axis)
        self._parts[axis] = parts

    def _join(self, a: int, b: int) -> None:
        self._free -= {a, b}
        (a, _), (b, _) = self.units(a), self.units(b)
        if a == b:
            return
        common = math.gcd(self._size[a], self._size[b])
        top = next((x for x in (a, b) if self._size[x] == common), None)
        if top is None:
            top = self.new(common)[0].axis
        reasons = [self._bound[x] for x in (a, b) if x in self._bound]
        for x in {a, b} - {top}:
            self._above[x] = top, self._size[x] // common
        if reasons:
            self._bound[top] = reasons[0]


def blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair the dimensions of a base and its view that hold the same entries, except sizes of 1."""
    found: list[tuple[list[int], list[int]]] = []
    olds = [d for d, n in enumerate(old) if n != 1]
    news = [d for d, n in enumerate(new) if n != 1]
    while olds and news:
        mine, yours = [olds.pop(0)], [news.pop(0)]
        a, b = old[mine[0]], new[yours[0]]
        while a != b:
            if a < b:
                mine.append(olds.pop(0))
                a *= old[mine[-1]]
            else:
                yours.append(news.pop(0))
                b *= new[yours[-1]]
        found.append((mine, yours))
    return found
