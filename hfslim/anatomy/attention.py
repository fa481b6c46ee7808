"""Find the heads of one attention module: the tensors that hold them, and their order there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hfslim.anatomy import families
from hfslim.anatomy.projections import Projection, cuts_of, feed_of, groups_of
from hfslim.anatomy.slices import Cut, Feed
from hfslim.anatomy.units import HeadPart, Refusal, Site

Find = Callable[[str, Iterable[str]], Projection | None]
"""Returns the first of some names below a path that is a projection."""


def find_heads(path: str, module: nn.Module, config: Any, find: Find) -> Site | Refusal | None:
    """Return the heads of a module, why none can go, or None if it is no attention module.

    Args:
        path: Path of the module.
        module: The module.
        config: The model's config.
        find: Finds projections by name.
    """
    reason = families.refused_heads(module, config)
    if reason:
        return Refusal("heads", path, reason)
    return _Finder(path, module, families.attention(module), find).site()


@dataclass(frozen=True)
class _Heads:
    """The heads of one module, with the cuts of their query, key and value projections."""

    units: int
    queries: int
    cuts: tuple[Cut, ...] = ()
    shared: bool = False
    projections: tuple[Projection, ...] = ()


@dataclass(frozen=True)
class _Finder:
    path: str
    module: nn.Module
    known: families.Attention
    find: Find

    def site(self) -> Site | Refusal | None:
        known = self.known
        if known.carrier:
            return self._raw()
        output = self.find(self.path, [known.output] if known.output else families.ATTENTION_OUTPUT)
        if output is None or not output.inputs:
            return None
        norms = self._norms()
        if norms:
            return self._under_norms(norms, output)
        heads = self._fused(output) or self._separate(output)
        if heads is None or isinstance(heads, Refusal):
            return heads
        blocks = groups_of([*heads.projections, output])
        if blocks:
            return self._grouped(heads, output, blocks)
        units, group = heads.units, heads.queries // heads.units
        also = [self.find(self.path, (name,)) for name in known.outputs]
        outputs = [output, *(one for one in also if one is not None)]
        columns = (cut for one in reversed(outputs) for cut in one.columns(one.inputs // units))
        return Site(
            kind="heads",
            path=self.path,
            size=units,
            feeds=tuple(Feed(one.path, width=one.inputs // units) for one in outputs),
            cuts=(*heads.cuts, *self._further(units), *columns),
            attributes=self._counts(heads, output.inputs // heads.queries),
            fixed=(0,) if known.keeps_one else (),
            heads=HeadPart(
                queries=group,
                shared=heads.shared,
                replacement=known.replacement or ("CountedHeads" if known.count_field else ""),
                headless=known.headless,
                count_field=known.count_field,
            ),
        )

    def _norms(self) -> tuple[str, ...]:
        """Return the norms that run across the queries or keys of all heads."""
        size, found = self._head_size(), []
        for name in families.ACROSS_HEADS:
            weight = getattr(getattr(self.module, name, None), "weight", None)
            if weight is not None and weight.numel() > (size or weight.numel()):
                found.append(f"{self.path}.{name}")
        return tuple(found)

    def _under_norms(self, norms: tuple[str, ...], output: Projection) -> Site | Refusal | None:
        """Return heads whose queries and keys stay, because norms run across those of all heads."""
        size, (query, key, value) = self._head_size(), self._projections()
        if query is None or key is None or value is None or not size or value.outputs < size:
            return None
        units, queries = value.outputs // size, output.inputs // size
        if queries % units:
            reason = "its query and key norms run across all heads, so no head can go exactly"
            return Refusal("heads", self.path, reason)
        width = queries // units * size
        return Site(
            kind="heads",
            path=self.path,
            size=units,
            feeds=(Feed(output.path, width=width),),
            cuts=(*value.rows(size), *output.columns(width), *self._further(units)),
            heads=HeadPart(queries=queries // units, norms=norms),
        )

    def _grouped(self, heads: _Heads, output: Projection, blocks: int) -> Site | Refusal:
        """Return units of one head out of each group of the convolutions around them."""
        if heads.units % blocks:
            reason = f"its {heads.units} heads do not divide into the {blocks} groups of its maps"
            return Refusal("heads", self.path, reason)
        if heads.units == blocks:
            reason = f"each of the {blocks} groups of its maps has a single head"
            return Refusal("heads", self.path, reason)
        size, units = output.inputs // heads.units, heads.units // blocks
        return Site(
            kind="heads",
            path=self.path,
            size=units,
            feeds=(feed_of(output, blocks, size),),
            cuts=cuts_of(heads.projections, output, blocks, size),
            attributes=self._counts(_Heads(units, heads.units), size),
            fixed=(0,) if self.known.keeps_one else (),
            heads=HeadPart(queries=blocks),
        )

    def _raw(self) -> Site | None:
        """Return the heads of a module whose projections are tensors of its own."""
        count = self._first(families.QUERY_HEAD_COUNTS)
        if not count:
            return None
        name, dim, ndim = self.known.carrier[0]
        return Site(
            kind="heads",
            path=self.path,
            size=count,
            feeds=(Feed(f"{self.path}.{name}", dim, ndim=ndim),),
            cuts=tuple(Cut(self.path, tensor, d) for tensor, d in self.known.tensors),
            attributes=self._counts(_Heads(count, count), 1),
            heads=HeadPart(headless=self.known.headless),
        )

    def _separate(self, output: Projection) -> _Heads | Refusal | None:
        query, key, value = self._projections()
        if query is None or key is None or value is None:
            return None
        size, count = self._head_size(), self._first(families.QUERY_HEAD_COUNTS)
        if self.known.count_field:
            # The replacement gives this module's own number.
            count = getattr(self.module.config, self.known.count_field)
        if self.known.counted or not size:
            units = self._first(families.KEY_HEAD_COUNTS) or count
        else:
            units = key.outputs // size
        if not units:
            return None
        # One projection to keys and values gives each head the key, then the value.
        value_size = (output.inputs if value == key else value.outputs) // units
        queries = output.inputs // max(value_size, 1)
        fits = queries % units == 0 and queries and query.outputs % queries == 0
        if not fits or output.inputs != queries * value_size:
            reason = f"{query.outputs} query features do not fit {output.inputs} of {output.path!r}"
            return Refusal("heads", self.path, reason)
        if units == 1 and queries > 1:
            rows = tuple(query.rows(query.outputs // queries))
            return _Heads(queries, queries, rows, shared=True)
        blocks = 2 if self.known.paired else 1
        projections = tuple(dict.fromkeys((query, key, value)))
        cuts = tuple(
            cut for one in projections for cut in one.rows(*[one.outputs // units] * blocks)
        )
        return _Heads(units // blocks, queries, cuts, projections=projections)

    def _fused(self, output: Projection) -> _Heads | None:
        known = self.known
        names = dict([known.fused]) if known.fused else families.FUSED_QKV
        fused = self.find(self.path, names)
        if fused is None:
            return None
        layout = next(layout for name, layout in names.items() if fused.path.endswith(f".{name}"))
        size, count = self._head_size(), self._first(families.QUERY_HEAD_COUNTS)
        if known.counted:
            return _Heads(count, count, tuple(fused.rows(fused.outputs // count)))
        if not size and not count:
            return None
        size = size or output.inputs // count
        queries = output.inputs // size
        units = (fused.outputs - output.inputs) // (2 * size)
        if units == 1 and queries > 1:
            return _Heads(queries, queries, tuple(fused.rows(size)), shared=True)
        if not units or fused.outputs != (queries + 2 * units) * size or queries % units:
            return None
        group = queries // units
        widths = [(group + 2) * size] if layout == "heads" else [group * size, size, size]
        return _Heads(units, queries, tuple(fused.rows(*widths)))

    def _projections(self) -> list[Projection | None]:
        """Return the query, key and value projections."""
        known = self.known
        return [
            self.find(self.path, [name] if name else names)
            for name, names in (
                (known.query, families.QUERY),
                (known.key, families.KEY),
                (known.value, families.VALUE),
            )
        ]

    def _further(self, units: int) -> list[Cut]:
        """Return the cuts of further projections and tensors by head."""
        cuts: list[Cut] = []
        for name in families.PER_HEAD_ROWS:
            extra = self.find(self.path, (name,))
            if extra is not None:
                cuts += extra.rows(extra.outputs // units)
        for name, dim in (*families.PER_HEAD_TENSORS, *self.known.tensors):
            inside, _, tensor = name.rpartition(".")
            holder: Any = self.module
            for part in inside.split(".") if inside else ():
                holder = getattr(holder, part, None)
            value = getattr(holder, tensor, None)
            if value is not None:
                owner = f"{self.path}.{inside}" if inside else self.path
                cuts.append(Cut(owner, tensor, dim, (value.shape[dim] // units,)))
        return cuts

    def _counts(self, heads: _Heads, size: int) -> tuple[tuple[str, int], ...]:
        """Return the module's attributes that count heads, with the amount per unit."""
        group = heads.queries // heads.units
        counts = dict.fromkeys(families.QUERY_HEAD_COUNTS, group)
        if heads.shared:
            counts |= dict.fromkeys(families.QUERIES_PER_KEY, 1)
        else:
            counts |= dict.fromkeys(families.KEY_HEAD_COUNTS, 1)
        counts |= dict.fromkeys((*families.ALL_HEADS_SIZE, *self.known.sizes), group * size)
        # A name that counts something else in this family has another value.
        has = vars(self.module).get
        return tuple((n, by) for n, by in counts.items() if has(n) == by * heads.units)

    def _head_size(self) -> int:
        return self._first(families.HEAD_DIM)

    def _first(self, names: Iterable[str]) -> int:
        values: Iterable[Any] = (vars(self.module).get(name) for name in names)
        return next((value for value in values if isinstance(value, int) and value), 0)
