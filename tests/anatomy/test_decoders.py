"""Decoders as sequence classifiers: units go, padding and pooling stay right."""

import pytest
import sweep
import torch
import zoo
from structures import uneven

import hfslim
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.structure import Structure

# Falcon and GPT-2 take positions from the mask or the index, so that sides differ even when stock.
DECODERS = (
    "llama",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "mistral",
    "gpt_neox",
    "phi3",
    "mixtral",
)


def _padded(side, length=12, longest=16):
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, zoo.VOCABULARY, (2, length), generator=generator)
    pad = torch.zeros(2, longest - length, dtype=torch.long)
    parts = [pad, ids] if side == "left" else [ids, pad]
    mask = [torch.zeros_like(pad), torch.ones_like(ids)]
    return {
        "input_ids": torch.cat(parts, 1),
        "attention_mask": torch.cat(mask if side == "left" else mask[::-1], 1),
    }


@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_padding_on_either_side_gives_the_logits_of_no_padding(kind):
    model = zoo.tiny(f"text/{kind}")
    bare = {name: value[:, :12] for name, value in _padded("right").items()}
    spread = model(**_padded("left")).logits - model(**_padded("right")).logits
    assert spread.abs().max() < 1e-5, "the stock model does not treat both sides alike"
    structure = uneven(model)
    with hfslim.gated(model, structure):
        expected = model(**bare).logits
    hfslim.shrink(model, structure)
    assert (model(**bare).logits - expected).abs().max() < 1e-5
    for side in ("left", "right"):
        assert (model(**_padded(side)).logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "mistral"])
def test_a_group_of_queries_goes_with_its_key_and_value(kind):
    model = zoo.tiny(f"text/{kind}")
    site = next(site for site in find_units(model) if site.kind == "heads")
    assert (site.size, site.heads.queries, site.heads.shared) == (2, 2, False)


@pytest.mark.parametrize("kind", ["llama", "falcon", "gpt_bigcode"])
@torch.no_grad()
def test_queries_that_share_the_last_key_and_value_go_one_by_one(kind):
    model = zoo.tiny(f"text/{kind}")
    if kind == "llama":
        sites = [site for site in find_units(model) if site.kind == "heads"]
        kept = {site.path: ([1], site.size) for site in sites}
        hfslim.shrink(model, hfslim.Structure.of({"heads": kept}))
    sites = [site for site in find_units(model) if site.kind == "heads"]
    assert all(site.heads.shared and site.width == zoo.HEAD for site in sites)
    structure = uneven(model, seed=1, kinds=["heads"])
    inputs = _padded("right")
    with hfslim.gated(model, structure):
        expected = model(**inputs).logits
    hfslim.shrink(model, structure)
    assert (model(**inputs).logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "units", "plain"),
    [
        ("gpt2", "layers", True),
        ("gpt_neo", "layers", True),
        # Its decay depends on how many layers there were.
        ("minimax", "layers", False),
        ("diffllama", "heads", True),
        ("qwen3_5", "layers", True),
    ],
)
def test_a_cut_is_exact_and_told_by_the_plain_config_where_that_can(kind, units, plain, tmp_path):
    difference, told = sweep.prove(f"text/{kind}", "eager", (units,), tmp_path)
    assert difference < 1e-5
    assert told == plain


def test_what_sees_images_is_not_offered_in_a_classifier_of_texts():
    units = find_units(zoo.tiny("text/qwen3_5"))
    assert not any("visual" in site.path for site in units)
    assert {(r.path, r.reason) for r in units.refusals if r.kind == "neurons"} == {
        ("model.visual", "it sees image and video, but texts are classified by input_ids")
    }


@pytest.mark.parametrize("layers", [3, 6])
def test_layers_whose_types_are_computed_from_positions_stay(layers):
    model = zoo.tiny("text/jamba", num_hidden_layers=layers)
    (site,) = find_units(model).of(["layers"])
    types = model.config.layer_types
    assert all(set(types[i:]) == {types[i]} for i in site.removable)
    assert site.removable


@pytest.mark.parametrize("case", ["qwen3_next", "qwen3_5_text", "qwen3_5"])
def test_one_layer_of_attention_stays_beside_linear_attention(case):
    types = {"layer_types": ["full_attention"] * 2 + ["linear_attention"], "use_cache": True}
    fields = {"text_config": types} if case == "qwen3_5" else types
    model = zoo.tiny(f"text/{case}", **fields)
    (site,) = find_units(model).of(["layers"])
    assert site.removable == (1,)
    kept = Structure.of({"layers": {site.path: ((0, 2), 3)}})
    assert hfslim.shrink(model, kept).config.get_text_config().num_hidden_layers == 2
