"""Cuts that the stock config expresses: the same number of heads and neurons in every layer."""

from __future__ import annotations

import bisect
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from hfslim.anatomy import Units, find_units
from hfslim.hub import blueprint
from hfslim.prune.costs import Costs
from hfslim.prune.gates import Key
from hfslim.prune.latency import LatencyTable
from hfslim.prune.search import layers_to_go
from hfslim.prune.surgery import cut_for_now
from hfslim.prune.target import Target, UnreachableTargetError, unreachable
from hfslim.structure import Entry, Kind, Structure


def search_uniform(
    units: Units,
    scores: Mapping[Key, torch.Tensor],
    target: Target,
    costs: Costs | LatencyTable | None = None,
) -> Structure:
    """Find the uniform structure that loses the least importance and meets a target.

    All layers keep the same number of heads and the same number of neurons, one or more, each layer
    its own most important ones; the least important layers may go.

    Args:
        units: The sites that may lose units.
        scores: Importance of each unit by site, `[units]`.
        target: What the model may cost.
        costs: What the units cost; needed unless the target is a sparsity.

    Returns:
        The structure, over the sites of `units`.

    Raises:
        UnreachableTargetError: The target cannot be met; the message says what can.
        ValueError: The layers have different numbers of units.
    """
    pool = _Pool(units, scores, costs.step if isinstance(costs, LatencyTable) else 1)
    if costs is None:
        return pool.by_sparsity(target)
    budget = target.kept * costs.total * (1 + 1e-9)
    best: tuple[float, Structure] | None = None
    for number, heads in itertools.product(range(len(pool.to_go) + 1), pool.widths["heads"]):
        dropped = frozenset(path for path, _ in pool.to_go[:number])

        def cost(neurons: int, dropped: frozenset[str] = dropped, heads: int = heads) -> float:
            return costs.of(units, pool.structure(dropped, heads, neurons))

        widths = pool.widths["neurons"]
        affordable = bisect.bisect_right(widths, budget, key=cost)
        if affordable:
            neurons = widths[affordable - 1]
            lost = pool.lost(number, heads, neurons)
            if best is None or lost < best[0]:
                best = lost, pool.structure(dropped, heads, neurons)
    if best is None:
        raise unreachable(target, units, costs.of(units, pool.least()) / costs.total)
    return best[1]


def check_plain(model: PreTrainedModel, units: Units) -> None:
    """Check that a model's config can say that every layer has fewer units.

    Raises:
        ValueError: It cannot for some kind of unit; the message says for which it can.
    """
    family = type(model).__name__
    if getattr(model.config, "hfslim", None):
        raise ValueError(
            f"uniform=True: this {family} was cut before to a structure that its config cannot say"
        )
    kinds = list(dict.fromkeys(site.kind for site in units))
    if "experts" in kinds:
        raise ValueError("uniform=True is for heads, neurons and layers: leave experts out")
    plain = [kind for kind in kinds if _is_plain(model, units, kind)]
    if plain != kinds:
        wrong = [kind for kind in kinds if kind not in plain]
        raise ValueError(
            f"uniform=True: the config of {family} cannot say that there are fewer {wrong}; "
            + (f"set units={plain}" if plain else "it can say nothing of what `units` names")
        )


def _is_plain(model: PreTrainedModel, units: Units, kind: Kind) -> bool:
    """Cut a unit of a kind everywhere from a model without weights, and look at its config.

    The first unit, then the last: the layers of some families differ by their position.
    """
    for which in (0, -1):
        empty = blueprint.stock_model(model, model.config)
        everything = find_units(empty)
        kept = {}
        for site in units.of([kind]):
            gone = site.removable[which]
            kept[site.path] = ((i for i in range(site.size) if i != gone), site.size)
        structure = everything.complete(Structure.of({kind: kept}))
        with cut_for_now(empty, everything, structure, defaultdict(dict)):
            blueprint.describe(empty, everything, structure)
            if getattr(empty.config, "hfslim", None):
                return False
    return True


class _Pool:
    """What may be kept: the same widths everywhere, and some of the layers."""

    def __init__(self, units: Units, scores: Mapping[Key, torch.Tensor], step: int) -> None:
        self.units = units
        self.to_go = layers_to_go(units, scores, units.full())
        self.sizes: dict[Kind, int] = {}
        self.ranked: dict[Key, list[int]] = {}
        self.scores = {key: value.tolist() for key, value in scores.items()}
        for site in units:
            if site.kind == "layers":
                continue
            if self.sizes.setdefault(site.kind, site.size) != site.size:
                raise ValueError(
                    f"uniform=True needs the same number of {site.kind} in every layer; "
                    f"{site.path!r} has {site.size}, others {self.sizes[site.kind]}"
                )
            values = self.scores[site.kind, site.path]
            fixed = set(site.fixed)
            ranked = sorted(range(site.size), key=lambda i: (i not in fixed, -values[i], i))
            self.ranked[site.kind, site.path] = ranked
        self.widths: dict[str, Sequence[int]] = {
            kind: sorted({*range(every, self.sizes[kind], every), self.sizes[kind]})
            if kind in self.sizes
            else [0]
            for kind, every in (("heads", 1), ("neurons", step))
        }

    def structure(self, dropped: frozenset[str], heads: int, neurons: int) -> Structure:
        """Return the structure; units of dropped layers stay as they are."""
        width = {"heads": heads, "neurons": neurons}
        entries = []
        for site in self.units:
            kept = range(site.size)
            if site.kind == "layers":
                indices = [i for i in kept if f"{site.path}.{i}" not in dropped]
            elif site.layer in dropped:
                indices = list(kept)
            else:
                indices = sorted(self.ranked[site.kind, site.path][: width[site.kind]])
            entries.append(Entry(site.kind, site.path, tuple(indices), site.size))
        return Structure(tuple(entries))

    def lost(self, layers: int, heads: int, neurons: int) -> float:
        """Return the importance of what is removed; units of dropped layers are not counted."""
        width = {"heads": heads, "neurons": neurons}
        dropped = {path for path, _ in self.to_go[:layers]}
        lost = sum(score for _, score in self.to_go[:layers])
        for site in self.units:
            if site.kind != "layers" and site.layer not in dropped:
                key = (site.kind, site.path)
                gone = self.ranked[key][width[site.kind] :]
                lost += sum(self.scores[key][i] for i in gone)
        return lost

    def least(self) -> Structure:
        """Return the smallest structure."""
        dropped = frozenset(path for path, _ in self.to_go)
        return self.structure(dropped, self.widths["heads"][0], self.widths["neurons"][0])

    def by_sparsity(self, target: Target) -> Structure:
        """Remove a fraction of the units of each kind, the same number in every layer."""
        width = {
            kind: max(size - round(target.sparsity.get(kind, 0.0) * size), 1)
            for kind, size in self.sizes.items()
        }
        layers = sum(site.size for site in self.units if site.kind == "layers")
        number = round(target.sparsity.get("layers", 0.0) * layers)
        if number > len(self.to_go):
            raise UnreachableTargetError(
                f"target sparsity of layers {target.sparsity['layers']:g} cannot be reached: at "
                f"most {len(self.to_go)} of {layers} layers may go"
            )
        dropped = frozenset(path for path, _ in self.to_go[:number])
        return self.structure(dropped, width.get("heads", 0), width.get("neurons", 0))
