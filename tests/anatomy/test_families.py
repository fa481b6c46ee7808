"""The golden rule: gated ≡ shrunk ≡ reloaded, for every family, under every attention."""

import pytest
import torch
from models import FAMILIES, auto_class, tiny
from structures import uneven

import hfslim
from hfslim.anatomy.inputs import example_inputs

TOLERANCE = 1e-5
EAGER_ONLY = {"deberta-v2", "mpnet", "wavlm"}
CASES = [
    (family, attention)
    for family in FAMILIES
    for attention in ("eager", "sdpa")
    if attention == "eager" or family not in EAGER_ONLY
]


def _inputs(model, seed=3):
    length = 1200 if model.main_input_name == "input_values" else 12
    inputs = example_inputs(model, batch_size=3, seed=seed, length=length)
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, -4:] = 0
    return inputs


def _difference(one, other):
    return (one - other).abs().max().item()


@pytest.mark.parametrize(("family", "attention"), CASES)
@torch.no_grad()
def test_gated_equals_shrunk_equals_reloaded(family, attention, tmp_path):
    model = tiny(family, attention)
    inputs = _inputs(model)
    whole = model(**inputs).logits
    structure = uneven(model)
    with hfslim.gated(model, structure):
        expected = model(**inputs).logits
    assert _difference(expected, whole) > 1e-3, "the structure changes nothing"
    assert torch.equal(model(**inputs).logits, whole), "the gates left a trace"

    assert _difference(hfslim.shrink(model, structure)(**inputs).logits, expected) < TOLERANCE
    model.save_pretrained(tmp_path / "one")
    load = auto_class(family).from_pretrained
    again = load(tmp_path / "one", attn_implementation=attention).eval()
    assert type(again) is type(model)
    assert not getattr(again, "is_quantized", False)
    assert _difference(again(**inputs).logits, expected) < TOLERANCE

    second = uneven(again, seed=1, drop_layer=False)
    with hfslim.gated(again, second):
        expected = again(**inputs).logits
    assert _difference(hfslim.shrink(again, second)(**inputs).logits, expected) < TOLERANCE
    again.save_pretrained(tmp_path / "two")
    last = load(tmp_path / "two", trust_remote_code=True, attn_implementation=attention).eval()
    assert _difference(last(**inputs).logits, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["wavlm", "mpnet", "beit", "beit-shared"])
@torch.no_grad()
def test_open_gates_change_nothing_where_a_class_stands_in(family):
    model = tiny(family)
    inputs = _inputs(model)
    expected = model(**inputs).logits
    stock = type(model)
    with hfslim.gated(model, hfslim.find_units(model).full()):
        assert _difference(model(**inputs).logits, expected) < TOLERANCE
    assert type(model) is stock


@pytest.mark.parametrize("family", ["bert", "wavlm", "mpnet", "modernbert", "llama"])
def test_every_parameter_of_a_headless_model_gets_a_gradient(family):
    model = tiny(family)
    hfslim.shrink(model, uneven(model))
    model.train()
    model(**_inputs(model)).logits.sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    stock = tiny(family)
    stock.train()
    stock(**_inputs(stock)).logits.sum().backward()
    usual = {n for n, p in stock.named_parameters() if p.requires_grad and p.grad is None}
    assert set(without) <= usual
