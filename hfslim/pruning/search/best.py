"""Search the structure of greatest importance that meets a target."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from hfslim.anatomy.structure import Key, Kind, Structure
from hfslim.anatomy.units import Units
from hfslim.pruning.latency.latency_table import LatencyTable
from hfslim.pruning.search.coupled import lots, numbers_to_lose
from hfslim.pruning.search.pool import Candidate, Pool
from hfslim.pruning.search.price import UNPRICED, Price
from hfslim.pruning.search.unit_costs import Costs
from hfslim.pruning.search.widths import least_ms, widths_within
from hfslim.pruning.target import Target, UnreachableTargetError, unreachable

NARROW: tuple[Kind, ...] = ("heads", "neurons", "channels", "experts", "dimensions")
"""Kinds of units that lie inside layers."""


def best_structure(
    units: Units,
    scores: Mapping[Key, torch.Tensor],
    target: Target,
    price: Price = UNPRICED,
    within: Structure | None = None,
) -> Structure:
    """Find the structure of greatest importance that meets a target.

    Under a budget, for each number of layers, the least important layers are removed. For each
    number of heads, none included, the heads of greatest importance per cost are kept, and the rest
    of the budget is spent on neurons in the same way. The combination that loses the least
    importance wins (Kwon et al. 2022, arXiv 2204.09656, section 4.1, with layers, and heads of
    unequal cost). At least one head or neuron is kept, where there are any. The costs of channels,
    experts and dimensions depend on each other: see `numbers_to_lose`. Latency is not linear in the
    units: see `widths_within`.
    Ties go to the lower index, so that equal scores give equal structures everywhere.

    Args:
        units: The sites that may lose units.
        scores: Importance of each unit by site, `[units]`.
        target: What the model may cost.
        price: What structures cost, in the resource of the target; not needed for a sparsity.
        within: A structure that the result must be part of: units it lacks stay removed.

    Returns:
        The structure, over the sites of `units`.

    Raises:
        UnreachableTargetError: The target cannot be met; the message gives the nearest that can.
        ValueError: The price is one of another resource.
    """
    pool = Pool(units, scores, within)
    if target.resource == "sparsity":
        return _by_sparsity(pool, target)
    if price.resource != target.resource:
        raise ValueError(
            f"a target of {target.resource} needs costs in {target.resource}, got {price.resource}"
        )
    if isinstance(price, LatencyTable):
        found = widths_within(pool, price, target.kept * price.total)
        if found is None:
            raise unreachable(target, units, least_ms(units, price) / price.total)
        return found
    assert isinstance(price, Costs)
    # The tolerance keeps a budget that is met exactly from failing by rounding.
    budget = math.floor(target.kept * price.total + 1e-9 * price.total)
    coupled = any(site.coupled for site in units)
    under_budget = _under_coupled_budget if coupled else _under_budget
    best, least = under_budget(pool, price, budget)
    if best is None:
        raise unreachable(target, units, least / price.total)
    return best


def _under_budget(pool: Pool, costs: Costs, budget: int) -> tuple[Structure | None, int]:
    """Return the best structure within a budget, and the least that any could cost."""
    best: Structure | None = None
    least_lost, least = math.inf, costs.total
    for dropped, lost_layers in pool.fewer_layers():
        left = costs.without(pool.units, dropped)
        heads, neurons = (pool.candidates(k, dropped, left.unit) for k in ("heads", "neurons"))
        both = [*heads, *neurons]
        everything = pool.keeping(both, dropped)
        fixed = costs.of(pool.units, everything) - sum(unit.cost for unit in both)
        # At least one unit stays, because an encoder without any is no model.
        smallest = min((unit.cost for unit in both), default=0)
        least = min(least, fixed + smallest)
        if fixed + smallest > budget:
            continue
        lost, kept = _heads_then_neurons(heads, neurons, budget - fixed)
        if not kept and smallest:
            fitting = [unit for unit in both if unit.cost <= budget - fixed]
            kept = [max(fitting, key=lambda unit: unit.score)]
            lost -= kept[0].score
        if best is None or lost + lost_layers < least_lost:
            least_lost, best = lost + lost_layers, pool.keeping(kept, dropped)
    return best, least


def _heads_then_neurons(
    heads: list[Candidate], neurons: list[Candidate], budget: int
) -> tuple[float, list[Candidate]]:
    """Return the importance lost and the units kept by the best split of a budget."""
    head_cost, head_score = _running(heads)
    neuron_cost, neuron_score = _running(neurons)
    affordable = int(np.searchsorted(head_cost, budget, side="right"))
    spent = head_cost[:affordable]
    numbers = np.searchsorted(neuron_cost, budget - spent, side="right") - 1
    kept = head_score[:affordable] + neuron_score[numbers]
    best = int(np.argmax(kept))
    lost = head_score[-1] + neuron_score[-1] - kept[best]
    return float(lost), [*heads[:best], *neurons[: numbers[best]]]


def _running(units: list[Candidate]) -> tuple[np.ndarray, np.ndarray]:
    cost = np.cumsum([0, *(unit.cost for unit in units)])
    return cost, np.cumsum([0.0, *(unit.score for unit in units)])


def _under_coupled_budget(pool: Pool, costs: Costs, budget: int) -> tuple[Structure | None, int]:
    """Return the best structure within a budget, and the least that any costs, of coupled units."""
    best: Structure | None = None
    least_lost, least = math.inf, costs.total
    for dropped, lost_layers in pool.fewer_layers():
        units = [unit for kind in NARROW for unit in pool.candidates(kind, dropped, costs.unit)]
        cost = costs.of(pool.units, pool.keeping(units, dropped))
        going: dict[Key, list[Candidate]] = {}
        gone = {unit.key: len(unit.site.removable) for unit in units}
        for unit in sorted(units, key=lambda unit: (unit.score, -unit.index)):
            going.setdefault(unit.key, []).append(unit)
            gone[unit.key] -= 1
        for among in going.values():
            if among[0].site.needs_one and not among[0].site.fixed:
                among.pop()
        by_lot = {
            key: lots(
                [unit.score for unit in among],
                among[0].site.size - gone[key],
                costs.step_of(among[0].site),
            )
            for key, among in going.items()
            if among
        }
        numbers, saved = numbers_to_lose(costs, by_lot, gone, dropped, cost - budget)
        least = min(least, cost - saved)
        if cost - saved > budget:
            continue
        lost = {unit for key, among in going.items() for unit in among[: numbers.get(key, 0)]}
        total = lost_layers + sum(unit.score for unit in lost)
        if best is None or total < least_lost:
            least_lost, best = total, pool.keeping([u for u in units if u not in lost], dropped)
    return best, least


def _by_sparsity(pool: Pool, target: Target) -> Structure:
    """Keep the most important units of each kind, as many as a sparsity leaves."""
    dropped = pool.layers_at(target.sparsity.get("layers", 0.0))
    kept: list[Candidate] = []
    for kind in NARROW:
        there = pool.candidates(kind, dropped)
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
    return pool.keeping(kept, dropped)
