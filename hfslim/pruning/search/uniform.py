"""Search structures that the stock config expresses: the same numbers of units in every layer."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Set

import torch

from hfslim.anatomy.structure import Key, Kind, Structure
from hfslim.anatomy.units import Site, Units
from hfslim.pruning.search.plain_config import Stream
from hfslim.pruning.search.pool import Pool
from hfslim.pruning.search.price import UNPRICED, Price
from hfslim.pruning.target import Target, unreachable

Widths = Mapping[Kind, int]
"""Number of units of each kind that every layer keeps."""


def uniform_structure(
    units: Units,
    scores: Mapping[Key, torch.Tensor],
    target: Target,
    price: Price = UNPRICED,
    stream: Stream | None = None,
) -> Structure:
    """Find the uniform structure that loses the least importance and meets a target.

    All layers keep the same number of heads and the same number of neurons, one or more, each layer
    its own most important ones. The least important layers may be removed, and the residual stream
    may become as narrow as the config can express; without `stream` it stays whole. The arguments
    are otherwise those of `best_structure`.

    Raises:
        UnreachableTargetError: The target cannot be met; the message gives the nearest that can.
        ValueError: The layers have different numbers of units.
    """
    pool = Pool(units, scores)
    sizes = _sizes(units, stream)
    if target.resource == "sparsity":
        return _by_sparsity(pool, sizes, target, stream)
    size = sizes.get("neurons", 0)
    neurons = sorted({*range(price.step, size, price.step), size})
    pairs = _heads_and_dimensions(sizes, stream)
    budget = target.kept * price.total * (1 + 1e-9)
    best: Structure | None = None
    least_lost = math.inf
    for dropped, lost_layers in pool.fewer_layers():
        for heads, dimensions in pairs:
            at = [_widths(heads, number, dimensions) for number in neurons]

            def cost(widths: Widths, dropped: Set[str] = dropped) -> float:
                return price.of(units, equal_layers(pool, widths, dropped, stream))

            affordable = bisect.bisect_right(at, budget, key=cost)
            if affordable:
                widths = at[affordable - 1]
                lost = _lost(pool, widths, dropped, lost_layers, stream)
                if best is None or lost < least_lost:
                    least_lost, best = lost, equal_layers(pool, widths, dropped, stream)
    if best is None:
        heads, dimensions = min(pairs, key=lambda pair: pair[::-1])
        dropped = frozenset(path for path, _ in pool.layers_to_go)
        least = equal_layers(pool, _widths(heads, neurons[0], dimensions), dropped, stream)
        raise unreachable(target, units, price.of(units, least) / price.total)
    return best


def equal_layers(
    pool: Pool, widths: Widths, dropped: Set[str], stream: Stream | None = None
) -> Structure:
    """Return the structure whose layers keep the same numbers of units, each its own best ones.

    Units of the dropped layers, and dimensions outside of the stream's sites, stay as they are.

    Raises:
        ValueError: The layers have different numbers of units to begin with.
    """
    _sizes(pool.units, stream)
    kept = {
        key: ranked if _stays_whole(pool.units.site(*key), stream) else ranked[: widths[key[0]]]
        for key, ranked in pool.ranked.items()
        if pool.units.site(*key).layer not in dropped
    }
    return pool.structure(kept, dropped)


def _widths(heads: int, neurons: int, dimensions: int) -> Widths:
    return {"heads": heads, "neurons": neurons, "dimensions": dimensions}


def _stays_whole(site: Site, stream: Stream | None) -> bool:
    return site.kind == "dimensions" and site.path not in (stream.sites if stream else ())


def _sizes(units: Units, stream: Stream | None) -> dict[Kind, int]:
    """Return the number of units of each kind in every layer, or refuse different numbers."""
    sizes: dict[Kind, int] = {}
    for site in units:
        if site.kind == "layers" or _stays_whole(site, stream):
            continue
        if sizes.setdefault(site.kind, site.size) != site.size:
            raise ValueError(
                f"equal layers need the same number of {site.kind} to begin with; "
                f"{site.path!r} has {site.size}, others {sizes[site.kind]}"
            )
    return sizes


def _heads_and_dimensions(
    sizes: Mapping[Kind, int], stream: Stream | None
) -> list[tuple[int, int]]:
    """Return the numbers of heads and of dimensions that may be kept together, ascending."""
    heads = list(range(1, sizes.get("heads", 0) + 1)) or [0]
    if stream is None or "dimensions" not in sizes:
        return [(number, sizes.get("dimensions", 0)) for number in heads]
    return [(number, width) for number in heads for width in stream.widths(number or stream.heads)]


def _lost(
    pool: Pool, widths: Widths, dropped: Set[str], lost_layers: float, stream: Stream | None
) -> float:
    """Return the importance of the removed units; those of dropped layers are not counted."""
    lost = lost_layers
    for site in pool.units:
        if site.kind != "layers" and site.layer not in dropped and not _stays_whole(site, stream):
            key = site.key
            lost += sum(pool.scores[key][i] for i in pool.ranked[key][widths[site.kind] :])
    return lost


def _by_sparsity(
    pool: Pool, sizes: Mapping[Kind, int], target: Target, stream: Stream | None
) -> Structure:
    """Remove a fraction of the units of each kind, the same number in every layer.

    Heads and dimensions are those numbers nearest to it that may be kept together.
    """
    wanted = {
        kind: max(size - round(target.sparsity.get(kind, 0.0) * size), 1)
        for kind, size in sizes.items()
    }

    def distance(pair: tuple[int, int]) -> float:
        names: tuple[Kind, ...] = ("heads", "dimensions")
        return sum(
            abs(number - wanted[kind]) / sizes[kind]
            for kind, number in zip(names, pair, strict=True)
            if kind in target.sparsity and kind in wanted
        )

    # Reversed, so that of equally near pairs the largest wins.
    heads, dimensions = min(reversed(_heads_and_dimensions(sizes, stream)), key=distance)
    dropped = pool.layers_at(target.sparsity.get("layers", 0.0))
    widths = _widths(heads, wanted.get("neurons", 0), dimensions)
    return equal_layers(pool, widths, dropped, stream)
