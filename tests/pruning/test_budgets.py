"""Several cuts of one model, and the smallest one within a drop of a metric."""

import copy
import sys

import pytest
import torch
from models import tiny
from structures import Unchanged

import hfslim
from hfslim.anatomy.inputs import example_inputs
from hfslim.measuring.measurement import count_parameters, macs
from hfslim.pruning.obs.moments import gather


def _data(model, batches=2):
    for seed in range(batches):
        yield example_inputs(model, 4, seed, length=8) | {"labels": torch.arange(4) % 3}


def _prune(model, **options):
    return hfslim.prune(model, _data(model), progress=False, **options)


def _family(model, fractions, **options):
    return hfslim.prune_family(model, _data(model), fractions, progress=False, **options)


def _within(model, drop, evaluate, **options):
    return hfslim.prune_within(model, _data(model), drop, evaluate, progress=False, **options)


def _size(whole):
    """A metric that falls with the cost: what is left of the multiply-accumulates."""
    total = macs(whole, example_inputs(whole, length=8))

    modes = set()

    def evaluate(model):
        modes.add((model.training, torch.is_grad_enabled()))
        return macs(model, example_inputs(model, length=8)) / total

    evaluate.modes = modes
    return evaluate


@pytest.mark.parametrize(
    ("prune", "options", "message"),
    [
        (_within, {"drop": -0.1}, "max_metric_drop must be 0 or more"),
        (_within, {"drop": float("nan")}, "max_metric_drop must be 0 or more"),
        (_within, {"drop": "1%"}, "max_metric_drop must be 0 or more"),
        (_within, {"drop": 0.1, "resource": "sparsity"}, "resource must be one of"),
        (_family, {"fractions": []}, "fractions is a list of fractions"),
        (_family, {"fractions": {"macs": 0.5}}, "fractions is a list of fractions"),
        (_family, {"fractions": [0.5, 1.5]}, r"fraction to keep, in \(0, 1\]; got 1.5"),
        (_family, {"fractions": [0.5], "resource": "sparsity"}, "resource must be one of"),
        (_family, {"fractions": [0.5, 0.001]}, "cannot be reached"),
        (
            _family,
            {"fractions": [0.5], "uniform": True},
            r"cannot express fewer \['heads'\]",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(monkeypatch, prune, options, message):
    model = tiny("bert")

    def data(_):
        raise AssertionError("the data was touched")
        yield

    monkeypatch.setitem(globals(), "_data", data)
    evaluated = {"evaluate": len} if prune is _within else {}
    with Unchanged(model), pytest.raises(ValueError, match=message):
        prune(model, **options, **evaluated)


@pytest.mark.parametrize("given", ["family", "max_metric_drop", "evaluate", "resource"])
def test_prune_takes_a_target_only(given):
    with pytest.raises(TypeError, match=given):
        _prune(tiny("bert"), target={"macs": 0.5}, **{given: None})


def test_a_family_equals_separate_prunings_and_leaves_the_model_whole():
    model, kept = tiny("bert"), [0.8, 0.6, 0.5]
    separate = [copy.deepcopy(model) for _ in kept]
    with Unchanged(model):
        found = _family(model, kept, evaluate=_size(model))
    assert [member.kept for member in found] == kept
    for member, single, part in zip(found, separate, kept, strict=True):
        result = _prune(single, target={"macs": part})
        assert member.structure == result.structure
        state = member.model.state_dict()
        assert all(torch.equal(state[k], v) for k, v in single.state_dict().items())
        assert member.model.config.to_dict() == single.config.to_dict()


def test_a_family_is_scored_once(monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return gather(*args)

    monkeypatch.setattr(sys.modules["hfslim.pruning.obs.moments"], "gather", counted)
    _family(tiny("bert"), [0.8, 0.6])
    assert len(calls) == 1


def test_a_family_tells_what_each_costs():
    model = tiny("bert")
    inputs = example_inputs(model, length=8)
    found = _family(model, [0.8, 0.6], resource="parameters", inputs=inputs, evaluate=_size(model))
    assert found.metric == 1
    for member, row in zip(found, found.curve(), strict=True):
        whole, small = count_parameters(model), count_parameters(member.model)
        assert row["parameters"] == small / whole <= member.kept == row["parameters_asked"]
        assert row["macs"] == row["metric"] == macs(member.model, inputs) / macs(model, inputs)
        assert 0 < row["low"] <= row["high"]
    assert "parameters asked for" in str(found)


@pytest.mark.parametrize("drop", [0.05, 0.3, 0.42])
def test_the_smallest_model_within_a_drop_is_found(drop):
    model = tiny("bert")
    evaluate = _size(copy.deepcopy(model))
    inputs = example_inputs(model, length=8)
    result = _within(model.train(), drop, evaluate, inputs=inputs)
    assert evaluate.modes == {(False, False)}
    assert 1 - drop <= evaluate(model) <= 1 - drop + 1 / 64 + 0.01
    assert len(result.tries) <= 6
    assert all(t.within == (t.drop <= drop) for t in result.tries)
    smallest = min(t.kept for t in result.tries if t.within)
    again = tiny("bert")
    assert (
        result.structure
        == _prune(
            again, target={"macs": smallest}, inputs=example_inputs(again, length=8)
        ).structure
    )


def test_a_fraction_below_the_least_reachable_is_not_evaluated():
    model = tiny("bert")
    result = _within(model, 1.0, _size(model), units=("heads",))
    assert all(t.within for t in result.tries)
    assert 0 < len(result.tries) < 6
    # One head stays: see `best_structure`.
    assert result.structure.counts() == {"heads": (1, 12)}


def test_a_model_that_can_lose_nothing_stays_whole(caplog):
    model = tiny("bert")
    whole = count_parameters(model)
    with Unchanged(model):
        result = _within(model, 0.0, lambda m: float(count_parameters(m) == whole))
    assert result.structure.is_full
    assert "the model stays whole" in caplog.text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "finite number, it returned nan"),
        ("good", "must return a number"),
        (None, "number"),
    ],
)
@pytest.mark.parametrize("when", ["whole", "cut"])
def test_a_metric_that_is_no_number_leaves_the_model_whole(value, message, when):
    model = tiny("bert")
    values = iter([value] if when == "whole" else [0.5, 0.5, value])
    with Unchanged(model), pytest.raises(ValueError, match=message):
        _within(model, 0.1, lambda _: next(values))


def test_an_evaluation_that_fails_leaves_the_model_whole():
    model = tiny("bert").train()
    calls = []

    def evaluate(model):
        calls.append(model)
        if len(calls) == 3:
            raise KeyError("the disk is gone")
        return 1.0

    with Unchanged(model), pytest.raises(KeyError, match="the disk is gone"):
        _within(model, 0.1, evaluate)
