"""Find the heads of one attention module: which tensors hold them, in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hfslim.anatomy import families
from hfslim.anatomy.grouped import cuts_of, feed_of, groups_of
from hfslim.anatomy.projections import Projection
from hfslim.anatomy.units import Cut, Feed, HeadPart, Refusal, Site

Find = Callable[[str, Iterable[str]], Projection | None]
"""Returns the first of some names below a path that is a projection."""


@dataclass(frozen=True)
class Heads:
    """How the heads of one module lie.

    Attributes:
        units: Units: heads, or groups of heads that share keys and values.
        queries: Query heads.
        shared: Whether all heads share the one key and value, which then stay.
        inputs: Cuts of the query, key and value projections.
        projections: Where they are separate, these projections.
    """

    units: int
    queries: int
    shared: bool
    inputs: list[Cut]
    projections: tuple[Projection, ...] = ()


def find_heads(path: str, module: nn.Module, config: Any, find: Find) -> Site | Refusal | None:
    """Return the heads of a module, why it offers none, or None if it is no attention module.

    Args:
        path: Where the module is.
        module: The module.
        config: The model's config.
        find: Finds projections by name.
    """
    known = families.attention(module)
    field, value = known.refused_if or ("", None)
    if known.refused and (not field or getattr(config, field, None) == value):
        return Refusal("heads", path, known.refused)
    if known.carrier:
        return _raw(path, module, known)
    output = find(path, [known.output] if known.output else families.ATTENTION_OUTPUT)
    if output is None or not output.inputs:
        return None
    norms = _across_heads(module)
    if norms:
        return _under_norms(path, module, known, norms, find, output)
    heads = _fused(path, module, known, find, output) or _separate(
        path, module, known, find, output
    )
    if heads is None or isinstance(heads, Refusal):
        return heads
    size = output.inputs // heads.queries
    blocks = groups_of([*heads.projections, output])
    if blocks:
        return _grouped(path, module, known, heads, output, blocks)
    units, group = heads.units, heads.queries // heads.units
    cuts = list(heads.inputs)
    cuts += _further(path, module, known, find, units)
    outputs = [output]
    for name in known.outputs:
        also = find(path, (name,))
        if also is not None:
            outputs.append(also)
            cuts += also.columns(also.inputs // units)
    return Site(
        kind="heads",
        path=path,
        size=units,
        feeds=tuple(Feed(one.path, width=one.inputs // units) for one in outputs),
        cuts=(*cuts, *output.columns(group * size)),
        attributes=_counts(module, heads, size, known),
        fixed=(0,) if known.keeps_one else (),
        heads=HeadPart(
            queries=group,
            shared=heads.shared,
            replacement=known.replacement or ("CountedHeads" if known.count_field else ""),
            headless=known.headless,
            count_field=known.count_field,
        ),
    )


def _across_heads(module: nn.Module) -> list[str]:
    """Return the names of norms that run across all heads."""
    size, found = _head_size(module), []
    for name in families.ACROSS_HEADS:
        weight = getattr(getattr(module, name, None), "weight", None)
        if weight is not None and weight.numel() > (size or weight.numel()):
            found.append(name)
    return found


def _under_norms(
    path: str,
    module: nn.Module,
    known: families.Attention,
    norms: list[str],
    find: Find,
    output: Projection,
) -> Site | Refusal | None:
    """Return heads whose queries and keys stay, because norms run across those of all heads."""
    size = _head_size(module)
    query, key, value = (find(p, n) for p, n in _projections(path, known))
    if query is None or key is None or value is None or not size:
        return None
    units, queries = value.outputs // size, output.inputs // size
    if not units:
        return None
    if queries % units:
        reason = "its query and key norms run across all heads, so no head can go exactly"
        return Refusal("heads", path, reason)
    width = queries // units * size
    cuts = (*value.rows(size), *output.columns(width), *_further(path, module, known, find, units))
    return Site(
        kind="heads",
        path=path,
        size=units,
        feeds=(Feed(output.path, width=width),),
        cuts=cuts,
        heads=HeadPart(queries=queries // units, norms=tuple(f"{path}.{name}" for name in norms)),
    )


def _further(
    path: str, module: nn.Module, known: families.Attention, find: Find, units: int
) -> list[Cut]:
    """Return the cuts of further projections and tensors by head."""
    cuts: list[Cut] = []
    for name in (*families.PER_HEAD_ROWS, *known.rows):
        extra = find(path, (name,))
        if extra is not None:
            cuts += extra.rows(extra.outputs // units)
    for name, dim in (*families.PER_HEAD_TENSORS, *known.tensors):
        owner, _, tensor = f"{path}.{name}".rpartition(".")
        holder = module.get_submodule(name.rpartition(".")[0]) if _has(module, name) else None
        if holder is not None:
            cuts.append(Cut(owner, tensor, dim, (getattr(holder, tensor).shape[dim] // units,)))
    return cuts


def _projections(path: str, known: families.Attention) -> list[tuple[str, Iterable[str]]]:
    """Return where to find the query, key and value projections, by which names."""
    return [
        (path, [name] if name else names)
        for name, names in (
            (known.query, families.QUERY),
            (known.key, families.KEY),
            (known.value, families.VALUE),
        )
    ]


def _grouped(
    path: str,
    module: nn.Module,
    known: families.Attention,
    heads: Heads,
    output: Projection,
    blocks: int,
) -> Site | Refusal:
    """Return units of one head out of each group of the convolutions around them."""
    if heads.units % blocks:
        reason = f"its {heads.units} heads do not divide into the {blocks} groups of its maps"
        return Refusal("heads", path, reason)
    if heads.units == blocks:
        reason = f"each of the {blocks} groups of its maps has a single head"
        return Refusal("heads", path, reason)
    size, units = output.inputs // heads.units, heads.units // blocks
    return Site(
        kind="heads",
        path=path,
        size=units,
        feeds=(feed_of(output, blocks, size),),
        cuts=cuts_of(heads.projections, output, blocks, size),
        attributes=_counts(module, Heads(units, heads.units, False, []), size, known),
        fixed=(0,) if known.keeps_one else (),
        heads=HeadPart(queries=blocks),
    )


def _raw(path: str, module: nn.Module, known: families.Attention) -> Site | None:
    """Return the heads of a module whose projections are tensors of its own."""
    count = _first(module, families.QUERY_HEAD_COUNTS)
    if not count:
        return None
    name, dim, ndim = known.carrier[0]
    return Site(
        kind="heads",
        path=path,
        size=count,
        feeds=(Feed(f"{path}.{name}", dim, ndim=ndim),),
        cuts=tuple(Cut(path, tensor, d) for tensor, d in known.tensors),
        attributes=_counts(module, Heads(count, count, False, []), 1, known),
        heads=HeadPart(headless=known.headless),
    )


def _separate(
    path: str, module: nn.Module, known: families.Attention, find: Find, output: Projection
) -> Heads | Refusal | None:
    query, key, value = (find(p, n) for p, n in _projections(path, known))
    if query is None or key is None or value is None:
        return None
    size, count = _head_size(module), _first(module, families.QUERY_HEAD_COUNTS)
    if known.count_field:
        # The class that stands in already tells this module's own number.
        count = getattr(module.config, known.count_field)
    if known.counted or not size:
        units = _first(module, families.KEY_HEAD_COUNTS) or count
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
        return Refusal("heads", path, reason)
    if units == 1 and queries > 1:
        return Heads(queries, queries, True, query.rows(query.outputs // queries))
    blocks = 2 if known.paired else 1
    units //= blocks
    projections = dict.fromkeys((query, key, value))
    rows = (p.rows(*[p.outputs // (units * blocks)] * blocks) for p in projections)
    cuts = [cut for some in rows for cut in some]
    return Heads(units, queries, False, cuts, tuple(projections))


def _fused(
    path: str, module: nn.Module, known: families.Attention, find: Find, output: Projection
) -> Heads | None:
    names = {known.fused: known.layout} if known.fused else families.FUSED_QKV
    fused = find(path, names)
    if fused is None:
        return None
    layout = next(layout for name, layout in names.items() if fused.path.endswith(f".{name}"))
    size, count = _head_size(module), _first(module, families.QUERY_HEAD_COUNTS)
    if known.counted:
        return Heads(count, count, False, fused.rows(fused.outputs // count))
    if not size and not count:
        return None
    size = size or output.inputs // count
    queries = output.inputs // size
    units = (fused.outputs - output.inputs) // (2 * size)
    if units == 1 and queries > 1:
        return Heads(queries, queries, True, fused.rows(size))
    if not units or fused.outputs != (queries + 2 * units) * size or queries % units:
        return None
    group = queries // units
    if layout == "heads":
        return Heads(units, queries, False, fused.rows((group + 2) * size))
    return Heads(units, queries, False, fused.rows(group * size, size, size))


def _counts(
    module: nn.Module, heads: Heads, size: int, known: families.Attention
) -> tuple[tuple[str, int], ...]:
    group = heads.queries // heads.units
    counts = dict.fromkeys(families.QUERY_HEAD_COUNTS, group)
    if not heads.shared:
        counts |= dict.fromkeys(families.KEY_HEAD_COUNTS, 1)
    else:
        counts |= dict.fromkeys(families.QUERIES_PER_KEY, 1)
    counts |= dict.fromkeys((*families.ALL_HEADS_SIZE, *known.sizes), group * size)
    # A name that counts something else in this family has another value.
    return tuple((n, by) for n, by in counts.items() if vars(module).get(n) == by * heads.units)


def _head_size(module: nn.Module) -> int:
    return _first(module, families.HEAD_DIM)


def _first(module: nn.Module, names: Iterable[str]) -> int:
    values: Iterable[Any] = (vars(module).get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value), 0)


def _has(module: nn.Module, name: str) -> bool:
    for part in name.split("."):
        module = getattr(module, part, None)  # type: ignore[assignment]
        if module is None:
            return False
    return True
