import pytest
import torch
from models import FAMILIES, tiny
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    Olmo2Config,
    Olmo2ForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

import hfslim
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.slices import Cut
from hfslim.anatomy.structure import Structure

# Units of one layer: heads (key-value groups where these are fewer), neurons.
WIDTHS = {**dict.fromkeys(FAMILIES, (4, 48)), "dinov2": (4, 64)}
WIDTHS |= dict.fromkeys(("llama", "qwen2", "qwen3"), (2, 48))
ENCODERS = [family for family in FAMILIES if family != "swin"]


def _sizes(units, kind):
    return [site.size for site in units if site.kind == kind]


@pytest.mark.parametrize("family", ENCODERS)
def test_every_unit_of_the_encoder_is_found(family):
    units = find_units(tiny(family))
    heads, neurons = WIDTHS[family]
    assert _sizes(units, "layers") == [3]
    assert _sizes(units, "heads") == [heads] * 3
    assert _sizes(units, "neurons") == [neurons] * 3
    assert {refusal.kind for refusal in units.refusals} <= {"channels"}


def test_stages_of_unequal_width_are_lists_of_their_own():
    units = find_units(tiny("swin"))
    assert _sizes(units, "layers") == [2, 2]
    assert _sizes(units, "heads") == [2, 2, 4, 4]
    assert _sizes(units, "neurons") == [32, 32, 64, 64]


@pytest.mark.parametrize(("family", "head_size"), [("llama", 8), ("qwen3", 16)])
def test_heads_that_share_keys_and_values_are_one_unit(family, head_size):
    site = find_units(tiny(family)).site("heads", "model.layers.0.self_attn")
    assert site.size == 2
    assert site.width == 2 * head_size
    widths = {cut.module.rpartition(".")[2]: cut.widths[0] for cut in site.cuts}
    assert widths["q_proj"] == widths["o_proj"] == 2 * head_size
    assert widths["k_proj"] == widths["v_proj"] == head_size


@pytest.mark.parametrize("family", ["wavlm", "modernbert", "deberta-v2"])
@pytest.mark.parametrize("layers", [2, 3])
def test_a_first_layer_unlike_the_others_stays(family, layers):
    (site,) = find_units(tiny(family, num_hidden_layers=layers)).of(["layers"])
    assert site.fixed == (0,)
    assert site.removable == tuple(range(1, layers))


def test_deberta_without_convolution_may_lose_any_layer():
    (site,) = find_units(tiny("deberta-v2", conv_kernel_size=0)).of(["layers"])
    assert site.fixed == ()


def test_the_last_layer_of_a_list_is_not_offered():
    assert _sizes(find_units(tiny("bert", num_hidden_layers=1)), "layers") == []


def test_layers_that_the_classifier_weighs_are_refused_with_the_reason():
    units = find_units(tiny("wav2vec2", use_weighted_layer_sum=True))
    assert _sizes(units, "heads") == [4, 4, 4]
    with pytest.raises(
        ValueError, match=r"no layers .*use_weighted_layer_sum.* it has \['channels', 'heads'"
    ):
        units.of(["layers"])


def test_heads_under_a_norm_across_them_leave_queries_and_keys():
    config = Olmo2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    units = find_units(Olmo2ForSequenceClassification(config))
    assert _sizes(units, "neurons") == [48, 48]
    heads = units.of(["heads"])
    assert _sizes(heads, "heads") == [4, 4]
    cut = {name for site in heads for one in site.cuts for name in one.module.split(".")[-1:]}
    assert cut == {"v_proj", "o_proj"}


def test_a_model_without_the_units_asked_for_is_refused():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    model = ResNetForImageClassification(config)
    assert {site.kind for site in find_units(model)} == {"channels"}
    with pytest.raises(
        ValueError, match=r"no heads that can be removed \(found no .*; it has \['channels'\]"
    ):
        hfslim.prune(model, [{"pixel_values": torch.zeros(1, 3, 32, 32)}], target={"macs": 0.5})


@pytest.mark.parametrize(
    ("kinds", "message"),
    [((), "no kind of unit given"), (("head",), "unknown kind of unit 'head'")],
)
def test_unknown_kinds_are_refused(kinds, message):
    with pytest.raises(ValueError, match=message):
        find_units(tiny("bert")).of(kinds)


def test_a_module_list_without_units_is_no_list_of_layers():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert len(find_units(model)) == 0


def test_looking_changes_nothing():
    model = tiny("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_units(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_cut_takes_the_rows_of_each_block():
    cut = Cut("m", "weight", 0, widths=(2, 2, 2))
    assert cut.indices([0, 2], total=3, length=18).tolist() == [
        0,
        1,
        4,
        5,
        6,
        7,
        10,
        11,
        12,
        13,
        16,
        17,
    ]


class TestComplete:
    def test_fills_in_the_sites_left_out(self):
        units = find_units(tiny("bert"))
        path = "bert.encoder.layer.0.attention.self"
        whole = units.complete(Structure.of({"heads": {path: ([1], 4)}}))
        assert whole.counts() == {"heads": (9, 12), "neurons": (144, 144), "layers": (3, 3)}

    @pytest.mark.parametrize(
        ("family", "sites", "error", "message"),
        [
            ("bert", {"heads": {"nowhere": ([0], 4)}}, KeyError, "no heads at 'nowhere'"),
            ("bert", {"layers": {"bert.encoder.layer": ([0], 4)}}, ValueError, "counts 4 layers"),
            ("bert", {"layers": {"bert.encoder.layer": ([], 3)}}, ValueError, "at least one"),
            ("wavlm", {"layers": {"wavlm.encoder.layers": ([1, 2], 3)}}, ValueError, r"\[0\]"),
        ],
    )
    def test_refuses_what_the_model_cannot_lose(self, family, sites, error, message):
        units = find_units(tiny(family))
        with pytest.raises(error, match=message):
            units.complete(Structure.of(sites))


def test_the_table_names_sites_and_refusals():
    text = str(find_units(tiny("wav2vec2", use_weighted_layer_sum=True)))
    assert "wav2vec2.encoder.layers.0.feed_forward" in text
    assert "use_weighted_layer_sum" in text


class TestExampleInputs:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_run_through_the_model(self, family):
        model = tiny(family)
        with torch.no_grad():
            logits = model(**example_inputs(model, batch_size=2)).logits
        assert logits.shape == (2, 3)

    def test_keep_to_the_positions_and_avoid_padding(self):
        model = tiny("roberta")
        inputs = example_inputs(model, batch_size=64)
        assert inputs["input_ids"].shape == (64, 38)
        assert not (inputs["input_ids"] == model.config.pad_token_id).any()

    def test_follow_seed_and_length(self):
        model = tiny("bert")
        one, same, other = (example_inputs(model, 2, s, 7)["input_ids"] for s in (0, 0, 1))
        assert one.shape == (2, 7)
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_are_of_the_type_of_the_weights(self):
        model = tiny("vit").to(torch.bfloat16)
        assert example_inputs(model)["pixel_values"].dtype == torch.bfloat16

    def test_unknown_input_is_refused(self):
        model = tiny("bert")
        model.main_input_name = "point_cloud"
        with pytest.raises(ValueError, match="takes 'point_cloud'"):
            example_inputs(model)


def test_a_wrapper_is_refused_with_the_name_of_the_model_inside():
    wrapped = torch.compile(tiny("bert"), backend="eager")
    with pytest.raises(TypeError, match=r"OptimizedModule is a wrapper.*its '_orig_mod'"):
        find_units(wrapped)


def test_units_of_a_layer_that_is_run_again_and_again_are_found_once():
    config = AlbertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=48)
    units = find_units(AutoModelForSequenceClassification.from_config(config))
    assert {(site.kind, site.size, site.uses) for site in units} == {
        ("heads", 4, 12),
        ("neurons", 48, 12),
        ("layers", 12, 1),
    }


def test_runs_of_several_groups_of_layers_are_refused():
    config = AlbertConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=48, num_hidden_groups=2
    )
    units = find_units(AutoModelForSequenceClassification.from_config(config))
    with pytest.raises(ValueError, match=r"no layers .*run several times"):
        units.of(["layers"])


def test_a_name_is_no_model():
    with pytest.raises(TypeError, match="expected a model, got 'bert-base-uncased'"):
        find_units("bert-base-uncased")
