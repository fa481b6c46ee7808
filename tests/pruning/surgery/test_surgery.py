import copy
from dataclasses import replace

import pytest
import torch
import zoo
from models import tiny
from structures import Unchanged, uneven
from transformers import AutoModelForSequenceClassification

import hfslim
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.slices import Cut
from hfslim.anatomy.structure import Structure
from hfslim.anatomy.units import Units
from hfslim.pruning.surgery import surgery

ATTENTION = "bert.encoder.layer.1.attention.self"


@pytest.mark.parametrize("tensor", ["query", "key", "output"])
def test_a_cut_that_goes_wrong_is_taken_back(monkeypatch, tensor):
    model = tiny("bert")
    units = find_units(model)
    site = units.site("heads", ATTENTION)

    class Shifted(Cut):
        def indices(self, kept, total, length):
            return super().indices(kept, total, length).roll(1)

    cuts = tuple(
        Shifted(**vars(cut)) if tensor in cut.module and cut.tensor == "weight" else cut
        for cut in site.cuts
    )
    wrong = Units(tuple(replace(s, cuts=cuts) if s == site else s for s in units))
    monkeypatch.setattr(surgery, "find_units", lambda *_: wrong)
    kept = {"heads": {ATTENTION: ([0, 2], 4)}, "layers": {"bert.encoder.layer": ([1, 2], 3)}}
    with Unchanged(model), pytest.raises(RuntimeError, match="differs from the gated one"):
        hfslim.shrink(model, Structure.of(kept))


@pytest.mark.parametrize("family", ["wavlm", "mpnet", "swin", "qwen2"])
def test_a_description_that_fails_takes_everything_back(monkeypatch, family):
    model = tiny(family)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(surgery.blueprint, "describe", fail)
    with Unchanged(model), pytest.raises(OSError, match="disk full"):
        hfslim.shrink(model, uneven(model))


def test_a_second_cut_that_fails_leaves_the_first(monkeypatch):
    model = tiny("wavlm")
    hfslim.shrink(model, uneven(model))

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(surgery.blueprint, "describe", fail)
    with Unchanged(model), pytest.raises(OSError, match="disk full"):
        hfslim.shrink(model, uneven(model, seed=1, drop_layer=False))


def test_outputs_that_are_not_finite_cannot_be_checked():
    model = tiny("bert")
    model.classifier.bias.data[0] = float("nan")
    structure = uneven(model)
    with pytest.raises(RuntimeError, match="not finite"):
        hfslim.shrink(model, structure)


def test_a_cut_that_the_check_cannot_see_is_told(caplog):
    model = tiny("bert")
    structure = uneven(model)
    hfslim.shrink(copy.deepcopy(model), structure)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    model.classifier.weight.data.zero_()
    hfslim.shrink(model, structure)
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "change the logits of BertForSequenceClassification by 0 " in record.getMessage()


def test_a_structure_of_another_model_is_refused():
    model = tiny("bert")
    with Unchanged(model), pytest.raises(KeyError, match="has no"):
        hfslim.shrink(model, uneven(tiny("vit")))


def test_a_weight_that_the_class_does_not_build_has_to_be_folded_in_first():
    model = tiny("bert")
    dense = model.bert.encoder.layer[0].intermediate.dense
    torch.nn.utils.parametrizations.weight_norm(dense)
    with Unchanged(model), pytest.raises(ValueError, match=r"dense.*remove_parametrizations"):
        hfslim.shrink(model, uneven(model, kinds=["heads"]))
    torch.nn.utils.parametrize.remove_parametrizations(dense, "weight")
    hfslim.shrink(model, uneven(model, kinds=["heads"]))


def test_mode_and_trainability_are_kept():
    model = tiny("bert").train()
    model.bert.encoder.layer[0].requires_grad_(False)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    hfslim.shrink(model, uneven(model, drop_layer=False))
    assert model.training
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen


def test_works_in_half_precision():
    model = tiny("bert").to(torch.bfloat16)
    hfslim.shrink(model, uneven(model))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["bert", "mpnet", "deberta-v2", "wavlm", "swin"])
@torch.no_grad()
def test_hidden_states_and_attention_weights_can_be_asked_for(family):
    model = tiny(family)
    inputs = example_inputs(model, length=1200 if family == "wavlm" else 12)
    whole = len(model(**inputs, output_hidden_states=True).hidden_states)
    hfslim.shrink(model, uneven(model))
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    stages = family == "swin"
    assert len(outputs.hidden_states) == (whole if stages else whole - 1)


def test_what_a_layer_without_heads_returns_can_be_added_to_in_place():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(zoo.tiny_config("falcon")).eval()
    hfslim.shrink(model, uneven(model))
    assert any(type(m).__name__.startswith("Inputless") for m in model.modules())
    assert torch.isfinite(model(**example_inputs(model)).logits).all()
