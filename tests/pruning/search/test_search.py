import itertools
import math
import re
from dataclasses import replace

import pytest
import torch

from hfslim.anatomy.slices import Cut
from hfslim.anatomy.structure import Structure
from hfslim.anatomy.units import Site, Units
from hfslim.pruning.search.best import best_structure
from hfslim.pruning.search.unit_costs import Costs
from hfslim.pruning.target import Target, UnreachableTargetError

HEADS, NEURONS, LAYERS = 4, 6, 2
HEAD_COST, NEURON_COST, REST = 30, 10, 50


def _units(layers=False):
    cut = (Cut("any", "weight", 0),)
    sites = [Site("layers", "l", LAYERS)] if layers else []
    for i in range(LAYERS):
        around = f"l.{i}" if layers else ""
        sites.append(Site("heads", f"l.{i}.a", HEADS, cuts=cut, layer=around))
        sites.append(Site("neurons", f"l.{i}.f", NEURONS, cuts=cut, layer=around))
    return Units(tuple(sites))


def _costs(units):
    layer = HEADS * HEAD_COST + NEURONS * NEURON_COST
    unit = {"heads": HEAD_COST, "neurons": NEURON_COST}
    return Costs(
        "macs",
        LAYERS * layer + REST,
        {(s.kind, s.path): unit[s.kind] for s in units if s.kind != "layers"},
        {(s.kind, s.path): (layer,) * LAYERS for s in units if s.kind == "layers"},
    )


def _scores(units, seed):
    draw = torch.Generator().manual_seed(seed)
    return {(s.kind, s.path): torch.rand(s.size, generator=draw).double() for s in units}


def _importance(structure, scores):
    return sum(scores[e.kind, e.path][list(e.kept)].sum().item() for e in structure)


def _macs(kept):
    return Target("macs", kept)


def _best_by_brute_force(scores, budget):
    """With equal costs only the numbers of heads and neurons matter: try all pairs."""
    by_kind = {
        kind: sorted((v for (k, _), s in scores.items() if k == kind for v in s.tolist()))[::-1]
        for kind in ("heads", "neurons")
    }
    return max(
        sum(by_kind["heads"][:h]) + sum(by_kind["neurons"][:n])
        for h, n in itertools.product(range(LAYERS * HEADS + 1), range(LAYERS * NEURONS + 1))
        if h * HEAD_COST + n * NEURON_COST + REST <= budget
    )


@pytest.mark.parametrize("kept", [0.2, 0.35, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_finds_the_optimum_where_costs_are_equal(seed, kept):
    units = _units()
    costs, scores = _costs(units), _scores(units, seed)
    found = best_structure(units, scores, _macs(kept), costs)
    assert costs.of(units, found) <= kept * costs.total
    expected = _best_by_brute_force(scores, kept * costs.total)
    assert _importance(found, scores) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_finds_the_optimum_over_layers_where_each_number_of_layers_is_tried(kept):
    units = _units(layers=True)
    costs, scores = _costs(units), _scores(units, 0)
    least = int(scores["layers", "l"].argmin())
    options = []
    for dropped in ((), (least,)):
        inside = {k: v for k, v in scores.items() if k[1][:3] not in {f"l.{i}" for i in dropped}}
        narrow = {k: v for k, v in inside.items() if k[0] != "layers"}
        total = sum(v.sum().item() for v in narrow.values())
        loss = total - _best_by_brute_force(narrow, kept * costs.total)
        options.append(loss + sum(scores["layers", "l"][i].item() for i in dropped))
    found = best_structure(units, scores, _macs(kept), costs)
    layers = found.kept("layers", "l")
    lost = sum(scores["layers", "l"][i].item() for i in range(LAYERS) if i not in layers)
    for kind, part in (("heads", "a"), ("neurons", "f")):
        for i in layers:
            gone = set(range(len(scores[kind, f"l.{i}.{part}"])))
            gone -= set(found.kept(kind, f"l.{i}.{part}"))
            lost += sum(scores[kind, f"l.{i}.{part}"][u].item() for u in gone)
    assert costs.of(units, found) <= kept * costs.total
    assert lost == pytest.approx(min(options), rel=1e-12)


def test_may_keep_no_head_at_all():
    units = _units()
    costs, scores = _costs(units), _scores(units, 0)
    for key in scores:
        scores[key] = scores[key] * (1e-3 if key[0] == "heads" else 1.0)
    found = best_structure(units, scores, _macs(0.35), costs)
    assert found.counts() == {"heads": (0, 8), "neurons": (9, 12)}


def test_units_of_unequal_cost_compete_by_importance_per_cost():
    units = Units(tuple(Site("heads", path, 1, cuts=(Cut("any", "weight", 0),)) for path in "ab"))
    costs = Costs("macs", 100, {("heads", "a"): 80, ("heads", "b"): 20}, {})
    scores = {("heads", "a"): torch.tensor([2.0]), ("heads", "b"): torch.tensor([1.0])}
    found = best_structure(units, scores, _macs(0.5), costs)
    assert (found.kept("heads", "a"), found.kept("heads", "b")) == ((), (0,))


@pytest.mark.parametrize("target", [_macs(0.5), Target("sparsity", sparsity={"heads": 0.5})])
def test_ties_go_to_the_lower_index(target):
    units = _units().of(["heads"])
    scores = {(s.kind, s.path): torch.ones(s.size) for s in units}
    costs = Costs("macs", 240, {("heads", f"l.{i}.a"): HEAD_COST for i in range(2)}, {})
    found = best_structure(units, scores, target, costs)
    assert (found.kept("heads", "l.0.a"), found.kept("heads", "l.1.a")) == ((0, 1, 2, 3), ())


@pytest.mark.parametrize("layers", [False, True])
def test_the_least_reachable_is_told_and_can_be_reached(layers):
    units = _units(layers)
    costs, scores = _costs(units), _scores(units, 0)
    with pytest.raises(UnreachableTargetError) as failure:
        best_structure(units, scores, _macs(0.01), costs)
    least = float(re.search(r"(0\.\d+) of the macs", str(failure.value))[1])
    smallest = REST + min(costs.unit.values())
    assert least == math.ceil(1e4 * smallest / costs.total) / 1e4
    found = best_structure(units, scores, _macs(least), costs)
    assert costs.of(units, found) == smallest


def test_a_target_that_only_an_encoder_of_nothing_meets_is_refused():
    units = _units(layers=True)
    costs = _costs(units)
    with pytest.raises(UnreachableTargetError, match="cannot be reached"):
        best_structure(units, _scores(units, 0), _macs(REST / costs.total), costs)


def test_a_budget_met_exactly_is_met_whatever_the_rounding():
    units = Units((Site("heads", "a", 100, cuts=(Cut("any", "weight", 0),)),))
    costs = Costs("macs", 100, {("heads", "a"): 1}, {})
    scores = {("heads", "a"): torch.rand(100)}
    for percent in range(1, 101):
        found = best_structure(units, scores, _macs(percent / 100), costs)
        assert len(found.kept("heads", "a")) == percent


@pytest.mark.parametrize("layers", [False, True])
def test_within_never_brings_a_unit_back(layers):
    units = _units(layers)
    costs = _costs(units)
    before = units.full()
    for step, kept in enumerate((0.8, 0.6, 0.5, 0.3)):
        found = best_structure(units, _scores(units, step), _macs(kept), costs, within=before)
        assert found.within(before)
        assert costs.of(units, found) <= kept * costs.total
        before = found


def test_within_counts_nothing_for_units_of_a_layer_that_is_gone():
    units = _units(layers=True)
    costs, scores = _costs(units), _scores(units, 0)
    before = Structure.of({k: dict(v) for k, v in _by_kind(units.full(), layers=(1,)).items()})
    for part in (("heads", "l.0.a"), ("neurons", "l.0.f")):
        scores[part] = torch.zeros_like(scores[part])
    found = best_structure(units, scores, _macs(0.3), costs, within=before)
    assert costs.of(units, found) <= 0.3 * costs.total
    assert found.kept("layers", "l") == (1,)


def _by_kind(structure, layers):
    result = {}
    for e in structure:
        kept = layers if e.kind == "layers" else e.kept
        result.setdefault(e.kind, {})[e.path] = (kept, e.total)
    return result


def test_sparsity_counts_units_over_all_sites():
    units = _units(layers=True)
    target = Target("sparsity", sparsity={"heads": 0.25, "neurons": 0.5})
    found = best_structure(units, _scores(units, 0), target)
    assert found.counts() == {"heads": (6, 8), "neurons": (6, 12), "layers": (2, 2)}


def test_heads_that_go_with_their_layer_count_as_removed():
    units = _units(layers=True)
    target = Target("sparsity", sparsity={"heads": 0.75, "layers": 0.5})
    found = best_structure(units, _scores(units, 0), target)
    (layer,) = found.kept("layers", "l")
    assert len(found.kept("heads", f"l.{layer}.a")) == 2


def test_sparsity_of_layers_beyond_the_last_one_is_refused():
    units = _units(layers=True)
    with pytest.raises(UnreachableTargetError, match="at most 1 of 2 layers"):
        best_structure(units, _scores(units, 0), Target("sparsity", sparsity={"layers": 0.9}))


def test_fixed_layers_stay():
    units = Units((Site("layers", "l", 4, fixed=(0, 2)),))
    scores = {("layers", "l"): torch.tensor([0.0, 1.0, 0.0, 2.0])}
    found = best_structure(units, scores, Target("sparsity", sparsity={"layers": 0.25}))
    assert found.kept("layers", "l") == (0, 2, 3)


@pytest.mark.parametrize("target", [_macs(0.4), Target("sparsity", sparsity={"heads": 0.5})])
def test_fixed_heads_stay_whatever_their_scores(target):
    units = Units(tuple(replace(s, fixed=(0,)) if s.kind == "heads" else s for s in _units()))
    scores = _scores(units, 0)
    for layer in range(LAYERS):
        scores["heads", f"l.{layer}.a"][0] = 0.0
    costs = _costs(units)
    found = best_structure(units, scores, target, costs)
    assert all(0 in found.kept("heads", f"l.{layer}.a") for layer in range(LAYERS))
    if target.resource == "macs":
        assert costs.of(units, found) <= 0.4 * costs.total
    else:
        assert found.counts()["heads"] == (LAYERS * HEADS // 2, LAYERS * HEADS)


def test_a_budget_needs_costs():
    units = _units()
    with pytest.raises(ValueError, match="a target of macs needs costs"):
        best_structure(units, _scores(units, 0), _macs(0.5))
