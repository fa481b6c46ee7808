"""Choose the units to keep under a budget, by importance and cost."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from hfslim.anatomy.structure import Entry, Kind, Structure
from hfslim.anatomy.units import Site, Units
from hfslim.pruning.gates.gates import Key
from hfslim.pruning.latency.latency_table import LatencyTable
from hfslim.pruning.search.coupled import lots, numbers_to_lose
from hfslim.pruning.search.unit_costs import Costs
from hfslim.pruning.search.widths import least_ms, widths_within
from hfslim.pruning.target import Target, UnreachableTargetError, unreachable

logger = logging.getLogger(__name__)

NARROW: tuple[Kind, ...] = ("heads", "neurons", "channels", "experts", "dimensions")
"""Kinds of units that lie inside layers."""


def search(
    units: Units,
    scores: Mapping[Key, torch.Tensor],
    target: Target,
    costs: Costs | LatencyTable | None = None,
    within: Structure | None = None,
) -> Structure:
    """Find the structure of greatest importance that meets a target.

    For a budget: for each number of layers, the least important ones go; for each number of heads,
    none included, the heads of greatest importance per cost stay, and what is left of the budget
    is spent on neurons in the same way. The combination that loses the least importance wins
    (Kwon et al. 2022, arXiv 2204.09656, section 4.1, with layers, and heads of unequal cost).
    At least one head or neuron stays, where there are any. With channels, experts or dimensions,
    whose costs depend on each other, see `numbers_to_lose`; for a latency, which is not linear in
    the units, `widths_within`.
    Ties go to the lower index, so that the same scores give the same structure everywhere.

    Args:
        units: The sites that may lose units.
        scores: Importance of each unit by site, `[units]`.
        target: What the model may cost.
        costs: What the units cost; needed unless the target is a sparsity.
        within: A structure that the result must be part of: units it lacks stay removed.

    Returns:
        The structure, over the sites of `units`.

    Raises:
        UnreachableTargetError: The budget cannot be met; the message says what can.
        ValueError: `costs` are missing.
    """
    within = within or units.full()
    if isinstance(costs, LatencyTable):
        return _by_latency(units, scores, costs, target, within)
    pool = _Pool(units, scores, within)
    if target.resource == "sparsity":
        return _by_sparsity(pool, target)
    if costs is None:
        raise ValueError(f"a target of {target.resource} needs costs")
    return _by_budget(pool, costs, target)


@dataclass(frozen=True)
class _Unit:
    site: Site
    index: int
    score: float
    cost: int = 0

    @property
    def density(self) -> float:
        return self.score / self.cost if self.cost else np.inf


class _Pool:
    """The units that are still there, and which of the layers may go, in which order."""

    def __init__(self, units: Units, scores: Mapping[Key, torch.Tensor], within: Structure) -> None:
        self.units = units
        self.scores = {key: value.tolist() for key, value in scores.items()}
        self.present = {(s.kind, s.path): set(within.kept(s.kind, s.path)) for s in units}
        self.layers_gone = frozenset(
            f"{site.path}.{i}"
            for site in units
            if site.kind == "layers"
            for i in set(range(site.size)) - self.present["layers", site.path]
        )
        self.layers_to_go = layers_to_go(units, scores, within)

    def score(self, site: Site, index: int) -> float:
        return self.scores[site.kind, site.path][index]

    def of(self, kind: Kind, dropped: frozenset[str], costs: Costs | None = None) -> list[_Unit]:
        """List what may go of a kind outside of dropped layers, the most worthwhile first."""
        unit = costs.unit if costs else {}
        result = [
            _Unit(site, i, self.score(site, i), unit.get((kind, site.path), 0) if costs else 1)
            for site in self.units
            if site.kind == kind and site.layer not in dropped
            for i in sorted(self.present[kind, site.path].difference(site.fixed))
        ]
        # Of what must not go whole, the best comes first.
        whole = (u for u in sorted(result, key=lambda u: u.score) if not u.site.fixed)
        best = {u.site: u for u in whole if u.site.needs_one}
        return sorted(result, key=lambda unit: (best.get(unit.site) != unit, -unit.density))

    def fewer_layers(self) -> Iterator[tuple[frozenset[str], float]]:
        """Yield the layers that are gone, and the importance lost with them, one more each time."""
        dropped, lost = self.layers_gone, 0.0
        yield dropped, lost
        for path, score in self.layers_to_go:
            dropped, lost = dropped | {path}, lost + score
            yield dropped, lost

    def structure(self, kept: Iterable[_Unit], dropped: frozenset[str]) -> Structure:
        """Keep some units, and all layers but those dropped."""
        chosen: dict[Key, set[int]] = {key: set() for key in self.present}
        for unit in kept:
            chosen[unit.site.kind, unit.site.path].add(unit.index)
        entries = []
        for site in self.units:
            indices = chosen[site.kind, site.path].union(site.fixed)
            if site.kind == "layers":
                indices = {
                    i
                    for i in self.present["layers", site.path]
                    if f"{site.path}.{i}" not in dropped
                }
            elif site.layer in dropped:
                indices = self.present[site.kind, site.path]
            entries.append(Entry(site.kind, site.path, tuple(sorted(indices)), site.size))
        return Structure(tuple(entries))


def layers_to_go(
    units: Units, scores: Mapping[Key, torch.Tensor], within: Structure
) -> list[tuple[str, float]]:
    """List the layers that may go, the least important first, with scores; one a list stays."""
    result = []
    for site in units:
        if site.kind == "layers":
            values = scores["layers", site.path].tolist()
            there = set(within.kept("layers", site.path))
            free = sorted(there.intersection(site.removable), key=lambda i: (values[i], i))
            spare = len(free) - (0 if site.fixed else 1)
            result += [(f"{site.path}.{i}", values[i]) for i in free[:spare]]
    return sorted(result, key=lambda item: item[1])


def _by_budget(pool: _Pool, costs: Costs, target: Target) -> Structure:
    # A budget that is met exactly is met, even where the product falls short by rounding.
    budget = math.floor(target.kept * costs.total + 1e-9 * costs.total)
    if any(site.coupled for site in pool.units):
        return _by_coupled_budget(pool, costs, target, budget)
    best: tuple[float, Structure] | None = None
    least = costs.total
    for dropped, lost_layers in pool.fewer_layers():
        left = costs.without(pool.units, dropped)
        heads, neurons = (pool.of(kind, dropped, left) for kind in ("heads", "neurons"))
        everything = pool.structure([*heads, *neurons], dropped)
        fixed = costs.of(pool.units, everything) - sum(u.cost for u in (*heads, *neurons))
        # At least one unit stays: an encoder of which nothing is left is no model.
        smallest = min((u.cost for u in (*heads, *neurons)), default=0)
        least = min(least, fixed + smallest)
        if fixed + smallest > budget:
            continue
        lost, kept = _heads_then_neurons(heads, neurons, budget - fixed)
        if not kept and smallest:
            fitting = [u for u in (*heads, *neurons) if u.cost <= budget - fixed]
            kept = [max(fitting, key=lambda unit: unit.score)]
            lost -= kept[0].score
        if best is None or lost + lost_layers < best[0]:
            best = lost + lost_layers, pool.structure(kept, dropped)
    if best is None:
        raise unreachable(target, pool.units, least / costs.total)
    return best[1]


def _by_coupled_budget(pool: _Pool, costs: Costs, target: Target, budget: int) -> Structure:
    best: tuple[float, Structure] | None = None
    least = costs.total
    for dropped, lost_layers in pool.fewer_layers():
        units = [unit for kind in NARROW for unit in pool.of(kind, dropped, costs)]
        cost = costs.of(pool.units, pool.structure(units, dropped))
        going: dict[Key, list[_Unit]] = {}
        gone = {(u.site.kind, u.site.path): len(u.site.removable) for u in units}
        for unit in sorted(units, key=lambda unit: (unit.score, -unit.index)):
            key = (unit.site.kind, unit.site.path)
            going.setdefault(key, []).append(unit)
            gone[key] -= 1
        for among in going.values():
            if among[0].site.needs_one and not among[0].site.fixed:
                among.pop()
        parted = {
            key: lots(
                [unit.score for unit in among],
                among[0].site.size - gone[key],
                costs.step_of(among[0].site),
            )
            for key, among in going.items()
            if among
        }
        numbers, saved = numbers_to_lose(costs, parted, gone, dropped, cost - budget)
        least = min(least, cost - saved)
        if cost - saved > budget:
            continue
        lost = {unit for key, among in going.items() for unit in among[: numbers.get(key, 0)]}
        total = lost_layers + sum(unit.score for unit in lost)
        if best is None or total < best[0]:
            best = total, pool.structure([u for u in units if u not in lost], dropped)
    if best is None:
        raise unreachable(target, pool.units, least / costs.total)
    return best[1]


def _by_latency(
    units: Units,
    scores: Mapping[Key, torch.Tensor],
    table: LatencyTable,
    target: Target,
    within: Structure,
) -> Structure:
    found = widths_within(units, scores, table, target.kept * table.total, within)
    if found is None:
        raise unreachable(target, units, least_ms(units, table) / table.total)
    return found


def _heads_then_neurons(
    heads: list[_Unit], neurons: list[_Unit], budget: int
) -> tuple[float, list[_Unit]]:
    """Return the importance lost and the units kept of the best split of a budget."""
    head_cost, head_score = _running(heads)
    neuron_cost, neuron_score = _running(neurons)
    affordable = int(np.searchsorted(head_cost, budget, side="right"))
    spent = head_cost[:affordable]
    numbers = np.searchsorted(neuron_cost, budget - spent, side="right") - 1
    kept = head_score[:affordable] + neuron_score[numbers]
    best = int(np.argmax(kept))
    lost = head_score[-1] + neuron_score[-1] - kept[best]
    return float(lost), [*heads[:best], *neurons[: numbers[best]]]


def _running(units: list[_Unit]) -> tuple[np.ndarray, np.ndarray]:
    cost = np.cumsum([0, *(unit.cost for unit in units)])
    return cost, np.cumsum([0.0, *(unit.score for unit in units)])


def _by_sparsity(pool: _Pool, target: Target) -> Structure:
    kept: list[_Unit] = []
    to_go = sum(s.size for s in pool.units if s.kind == "layers")
    number = round(target.sparsity.get("layers", 0.0) * to_go)
    gone = len(pool.layers_gone)
    if number - gone > len(pool.layers_to_go):
        raise UnreachableTargetError(
            f"target sparsity of layers {target.sparsity['layers']:g} cannot be reached: at most "
            f"{len(pool.layers_to_go) + gone} of {to_go} layers may go"
        )
    going = frozenset(path for path, _ in pool.layers_to_go[: max(number - gone, 0)])
    dropped = pool.layers_gone | going
    for kind in NARROW:
        there = pool.of(kind, dropped)
        sites = [site for site in pool.units if site.kind == kind]
        total = sum(site.size for site in sites)
        fixed = sum(len(site.fixed) for site in sites if site.layer not in dropped)
        keep = total - fixed - round(target.sparsity.get(kind, 0.0) * total)
        needed = len({u.site for u in there if u.site.needs_one and not u.site.fixed})
        if keep < needed:
            raise UnreachableTargetError(
                f"target sparsity of {kind} {target.sparsity[kind]:g} cannot be reached: of "
                f"{total} {kind} one must stay in each of {needed} places"
                + (f", and {fixed} are fixed" if fixed else "")
            )
        kept += there[:keep]
    return pool.structure(kept, dropped)
