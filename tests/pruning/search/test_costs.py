import pytest
import torch
import zoo
from models import FAMILIES, tiny
from structures import uneven

import hfslim
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.measuring.measurement import count_parameters, macs
from hfslim.pruning.search import unit_costs


def _inputs(model):
    length = 1200 if model.main_input_name == "input_values" else 12
    return example_inputs(model, batch_size=1, length=length)


CASES = [(family, "eager") for family in FAMILIES] + [("bert", "sdpa"), ("llama", "sdpa")]


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_predicted_cost_is_what_the_cut_model_costs(family, attention):
    model = tiny(family, attention)
    inputs, units, structure = _inputs(model), find_units(model), uneven(model)
    priced = {r: unit_costs.count(model, units, r, inputs) for r in ("macs", "parameters")}
    assert priced["macs"].total == macs(model, inputs)
    assert priced["parameters"].total == count_parameters(model)
    hfslim.shrink(model, structure)
    assert priced["macs"].of(units, structure) == macs(model, inputs)
    assert priced["parameters"].of(units, structure) == count_parameters(model)


def test_a_head_costs_its_projections_and_its_share_of_attention():
    model = tiny("bert")
    length, width, head = 12, 32, 8
    units = find_units(model)
    priced = unit_costs.count(model, units, "macs", _inputs(model))
    found = priced.unit["heads", "bert.encoder.layer.0.attention.self"]
    assert found == 4 * length * width * head + 2 * length**2 * head
    assert priced.unit["neurons", "bert.encoder.layer.0"] == 2 * length * width


def test_a_neuron_of_a_gated_network_costs_three_projections():
    model = tiny("llama")
    units = find_units(model)
    priced = unit_costs.count(model, units, "macs", _inputs(model))
    assert priced.unit["neurons", "model.layers.0.mlp"] == 3 * 12 * 32
    # Two query heads of 8, and one key and one value head, in a model of width 32.
    group = 2 * (2 * 12 * 32 * 8 + 2 * 12**2 * 8) + 2 * 12 * 32 * 8
    assert priced.unit["heads", "model.layers.0.self_attn"] == group


def test_parameters_of_a_unit_are_the_tensor_entries_that_it_cuts():
    model = tiny("bert")
    priced = unit_costs.count(model, find_units(model), "parameters", {})
    heads = priced.unit["heads", "bert.encoder.layer.0.attention.self"]
    assert heads == 3 * (8 * 32 + 8) + 32 * 8
    assert priced.unit["neurons", "bert.encoder.layer.0"] == 32 + 1 + 32
    layer = sum(p.numel() for p in model.bert.encoder.layer[1].parameters())
    assert priced.layer["layers", "bert.encoder.layer"] == (layer,) * 3


def test_units_of_a_dropped_layer_are_not_counted_twice():
    model = tiny("bert")
    units = find_units(model)
    priced = unit_costs.count(model, units, "macs", _inputs(model))
    full = units.full().to_dict()
    full["layers"]["bert.encoder.layer"]["kept"] = [0, 2]
    without = priced.of(units, hfslim.Structure.from_dict(full))
    full["heads"]["bert.encoder.layer.1.attention.self"]["kept"] = []
    assert priced.of(units, hfslim.Structure.from_dict(full)) == without
    assert without == priced.total - priced.layer["layers", "bert.encoder.layer"][1]


def test_counting_leaves_the_model_in_its_mode():
    model = tiny("bert").train()
    unit_costs.count(model, find_units(model), "macs", _inputs(model))
    assert model.training
    assert not any(p.grad is not None for p in model.parameters())
    assert torch.is_grad_enabled()


# Beside the projections by head they have others: to latents, to fewer positions, to an index.
@pytest.mark.parametrize("case", ["text/deepseek_v3", "text/axk2", "image/pvt", "image/swinv2"])
def test_what_no_head_has_is_not_counted_as_theirs(case):
    model = zoo.tiny(case)
    inputs = example_inputs(model, 1, length=16)
    units = find_units(model).of(["heads"])
    priced = unit_costs.count(model, units, "macs", inputs)
    kept = {site.path: (list(range(1, site.size)), site.size) for site in units}
    structure = units.complete(hfslim.Structure.of({"heads": kept}))
    foretold = priced.of(units, structure)
    assert macs(hfslim.shrink(model, structure), inputs) == foretold < priced.total
