"""Options of a family's config beside its defaults, and inputs that a probe does not give."""

import pytest
import torch
import zoo
from structures import Unchanged, uneven

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.structure import Structure
from hfslim.pruning.gates.gates import gated
from hfslim.pruning.surgery.surgery import shrink

KINDS = ("heads", "neurons", "layers")


def inputs_of(model, length=16, **more):
    return example_inputs(model, 2, seed=3, length=length) | more


@torch.no_grad()
def distances(model, structure, inputs, folder):
    """Cut a model, and return how far it and its reload are from the gated one."""
    with gated(model, structure):
        expected = model(**inputs).logits
    found = shrink(model, structure)(**inputs).logits
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    return [(one - expected).abs().max().item() for one in (found, again(**inputs).logits)]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt_bigcode", {"multi_query": False}),
        ("big_bird", {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}),
        (
            "bigbird_pegasus",
            {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1},
        ),
    ],
)
@pytest.mark.parametrize("length", [16, 60])
def test_cut_and_reloaded_equal_gated(kind, options, length, tmp_path):
    model = zoo.tiny(f"text/{kind}", **options)
    structure = uneven(model, kinds=KINDS)
    assert max(distances(model, structure, inputs_of(model, length), tmp_path)) < 1e-5


def test_bigbird_keeps_its_sparse_attention_when_a_short_probe_turns_it_off():
    options = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
    model = zoo.tiny("text/big_bird", **options)
    shrink(model, uneven(model, kinds=("neurons",)))
    assert model.bert.attention_type == "block_sparse"
    classes = {type(layer.attention.self).__name__ for layer in model.bert.encoder.layer}
    assert classes == {"BigBirdBlockSparseAttention"}


@pytest.mark.parametrize("kinds", [("heads",), ("neurons",), ("layers",), KINDS])
def test_luke_is_cut_exactly_with_entities_too(kinds, tmp_path):
    model = zoo.tiny("text/luke")
    draw = torch.Generator().manual_seed(0)
    inputs = inputs_of(
        model,
        entity_ids=torch.randint(1, 16, (2, 3), generator=draw),
        entity_attention_mask=torch.ones(2, 3, dtype=torch.long),
        entity_position_ids=torch.randint(0, 16, (2, 3, 5), generator=draw),
    )
    structure = uneven(model, kinds=kinds)
    assert max(distances(model, structure, inputs, tmp_path)) < 1e-5


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("audio/wav2vec2-bert", {"position_embeddings_type": "rotary"}),
        ("audio/wav2vec2-conformer", {"position_embeddings_type": "rotary"}),
        ("image/data2vec-vision", {"use_shared_relative_position_bias": True}),
        ("text/deberta", {"relative_attention": True, "talking_head": True}),
        ("text/mvp", {"use_prompt": True}),
    ],
)
def test_heads_that_cannot_go_are_not_offered_where_an_option_says_so(case, options):
    (option,) = list(options)[-1:]
    usual = find_units(zoo.tiny(case))
    assert any(site.kind == "heads" for site in usual)
    units = find_units(zoo.tiny(case, **options))
    assert not any(site.kind == "heads" for site in units)
    reasons = {refusal.reason for refusal in units.refusals if refusal.kind == "heads"}
    assert reasons and all(option in reason or "rotary" in reason for reason in reasons)


def sliding(types: str) -> dict:
    """Layers of a mixture that has one dense layer, the second: short of the window all alike."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    return {
        "num_hidden_layers": len(types),
        "mlp_only_layers": [1],
        "use_sliding_window": True,
        "sliding_window": 24,
        "layer_types": [names[letter] for letter in types],
    }


def without(model, layer):
    (site,) = find_units(model).of(("layers",))
    kept = [i for i in range(site.size) if i != layer]
    return Structure.of({"layers": {site.path: (kept, site.size)}})


def test_layers_that_would_find_the_attention_of_others_beyond_the_probe_stay():
    model = zoo.tiny("text/qwen2_moe", **sliding("fsfsf"))
    with Unchanged(model), pytest.raises(RuntimeError, match=r"\[1, 2, 3, 4\].*Leave layers out"):
        shrink(model, without(model, 0))


@pytest.mark.parametrize(("types", "layer"), [("sssss", 0), ("fsfsf", 4)])
def test_layers_that_find_their_own_attention_may_go(types, layer, tmp_path):
    model = zoo.tiny("text/qwen2_moe", **sliding(types))
    found = distances(model, without(model, layer), inputs_of(model, 60), tmp_path)
    assert max(found) < 1e-5


def test_runs_of_what_is_left_of_several_layers_are_not_offered(tmp_path):
    model = zoo.tiny("text/albert", inner_group_num=2, num_hidden_groups=1)
    (site,) = find_units(model).of(("layers",))
    shrink(model, Structure.of({"layers": {site.path: ([0], 2)}})).save_pretrained(tmp_path)
    units = find_units(type(model).from_pretrained(tmp_path))
    assert not any(one.kind == "layers" for one in units)
    assert any("run several times" in one.reason for one in units.refusals)
