"""Weights that several modules share: their units go from all of them at once."""

import pytest
import sweep
import torch
import zoo
from structures import uneven

import hfslim
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.measuring.measurement import count_parameters, macs
from hfslim.pruning.gates.gates import Gates
from hfslim.pruning.search.unit_costs import count

FIRST, SECOND = (f"model.layers.{i}.shared_transf.self_attn" for i in (1, 4))


def _inputs(model, examples=3):
    return example_inputs(model, examples, seed=3, length=12)


@pytest.mark.parametrize(
    ("kind", "kinds"), [("zamba", ("heads", "neurons")), ("zamba2", ("heads",))]
)
def test_gated_equals_shrunk_equals_reloaded(kind, kinds, tmp_path):
    difference, plain = sweep.prove(f"text/{kind}", "eager", kinds, tmp_path)
    assert difference < 1e-5
    assert plain


def test_modules_that_share_weights_are_one_site_and_go_on_sharing_them():
    model = zoo.tiny("text/zamba")
    site = find_units(model).site("heads", FIRST)
    assert site.twins == (SECOND,)
    assert len(site.feeds) == 2
    hfslim.shrink(model, hfslim.Structure.of({"heads": {FIRST: ([1], site.size)}}))
    one, other = (model.get_submodule(path) for path in (FIRST, SECOND))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert getattr(one, name).weight is getattr(other, name).weight
    assert one.o_proj.in_features == other.o_proj.in_features == site.width


def test_layers_that_hold_shared_weights_stay():
    units = find_units(zoo.tiny("text/zamba"))
    assert units.site("layers", "model.layers").fixed == (1, 4)


@pytest.mark.parametrize("kinds", [("heads",), ("neurons",), ("heads", "neurons", "layers")])
def test_costs_are_those_of_the_cut_model(kinds):
    model = zoo.tiny("text/zamba")
    inputs, units = _inputs(model), find_units(model).of(kinds)
    structure = uneven(model, kinds=kinds)
    told = [count(model, units, r, inputs).of(units, structure) for r in ("parameters", "macs")]
    hfslim.shrink(model, structure)
    assert told == [count_parameters(model), pytest.approx(macs(model, inputs), rel=1e-3)]


def test_the_gradient_of_a_gate_sums_all_uses():
    model = zoo.tiny("text/zamba")
    found = {}
    with Gates(model) as gates:
        gates.on_gradient = lambda site, _, gradient: found.update({site.path: gradient})
        model(**_inputs(model, examples=1)).logits.sum().backward()
        gates.check_fired()
    weight = model.get_submodule(f"{FIRST}.o_proj").weight
    units = found[FIRST].shape[1]
    expected = (weight * weight.grad).view(len(weight), units, -1).sum((0, 2))
    torch.testing.assert_close(found[FIRST][0], expected, atol=1e-5, rtol=1e-4)


def test_modules_that_share_some_of_their_weights_are_refused():
    model = zoo.tiny("text/llama")
    one, other = (layer.self_attn for layer in model.model.layers[:2])
    other.q_proj.weight = one.q_proj.weight
    refused = {r.path for r in find_units(model).refusals if "share its weights" in r.reason}
    assert refused == {f"model.layers.{i}.self_attn" for i in (0, 1)}
