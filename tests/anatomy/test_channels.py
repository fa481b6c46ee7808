"""Channels of convolutions: found, gated, cut, priced, reloaded."""

import pytest
import torch
import zoo
from structures import uneven
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification

import hfslim
from hfslim.anatomy.axes import Axes, Segment
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.structure import Structure
from hfslim.measuring.measurement import count_parameters, macs
from hfslim.pruning.gates.gates import Gates, gated
from hfslim.pruning.search import unit_costs
from hfslim.pruning.surgery.batch_norms import renew_batch_norms

FAMILIES = ("resnet", "regnet", "mobilenet_v2", "hgnet_v2", "poolformer")
STEM = "resnet.embedder.embedder.convolution"


def _batch(model, size=4):
    return {**example_inputs(model, size, seed=5), "labels": torch.arange(size) % 3}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_gated_equals_cut_equals_reloaded_and_the_price_is_right(family, tmp_path):
    model = zoo.tiny(f"image/{family}")
    inputs, units = example_inputs(model, 2), find_units(model)
    assert {site.kind for site in units} == {"channels", "layers"}
    structure = units.complete(uneven(model))
    one = example_inputs(model, 1)
    priced = {r: unit_costs.count(model, units, r, one) for r in ("macs", "parameters")}
    whole = model(**inputs).logits
    with gated(model, structure):
        expected = model(**inputs).logits
    assert (expected - whole).abs().max() > 1e-4
    hfslim.shrink(model, structure)
    assert priced["macs"].of(units, structure) == macs(model, one)
    assert priced["parameters"].of(units, structure) == count_parameters(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    for cut in (model, again.eval()):
        torch.testing.assert_close(cut(**inputs).logits, expected, rtol=0, atol=1e-5)


def test_what_is_added_up_is_one_place_gated_at_all_that_take_it():
    units = find_units(zoo.tiny("image/resnet"))
    stem = units.site("channels", STEM)
    stage = "resnet.encoder.stages"
    assert stem.size == 16
    assert [feed.module for feed in stem.feeds] == [
        f"{stage}.0.layers.0.layer.0.convolution",
        f"{stage}.0.layers.1.layer.0.convolution",
        f"{stage}.1.layers.0.layer.0.convolution",
        f"{stage}.1.layers.0.shortcut.convolution",
    ]
    made = {cut.module for cut in stem.cuts if cut.tensor == "weight" and cut.dim == 0}
    assert {STEM, f"{stage}.0.layers.1.layer.2.convolution"} <= made


def test_a_unit_of_a_grouped_convolution_is_a_group():
    model = zoo.tiny("image/regnet")
    path = "regnet.encoder.stages.0.layers.0.layer.0.convolution"
    site = find_units(model).site("channels", path)
    assert (site.size, site.width) == (2, 8)
    hfslim.shrink(model, Structure.of({"channels": {path: ([1], 2)}}))
    grouped = model.regnet.encoder.stages[0].layers[0].layer[1].convolution
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (1, 8, 8)


@pytest.mark.parametrize(
    ("family", "path", "reason"),
    [
        ("convnext", "convnext.embeddings.patch_embeddings", "a norm runs across them"),
        ("vit", "vit.embeddings.patch_embeddings.projection", "a norm runs across them"),
        ("levit", "levit.patch_embeddings.embedding_layer_4.convolution", "hidden width"),
        ("focalnet", "focalnet.encoder.stages.0.layers.0.modulation.focal_layers.0.0", "groups"),
        ("bit", "bit.embedder.convolution", "are computed as the model runs"),
        ("pp_lcnet", "", "its output has no logits"),
    ],
)
def test_channels_that_cannot_go_exactly_are_refused_with_the_reason(family, path, reason):
    found = find_units(zoo.tiny(f"image/{family}"))
    assert not any(site.path == path for site in found)
    assert any(r.path == path and reason in r.reason for r in found.refusals)


def test_gradients_by_gates_are_those_of_factors_put_in_by_hand():
    model, seen = zoo.tiny("image/resnet"), {}
    batch = _batch(model, 3)
    site = find_units(model).site("channels", STEM)
    with Gates(model) as gates:
        gates.on_gradient = lambda s, _, gradient: seen.update({s.path: gradient})
        loss = cross_entropy(model(batch["pixel_values"]).logits, batch["labels"], reduction="sum")
        loss.backward()
    factor = torch.ones(3, site.size, requires_grad=True)

    def multiply(_, args):
        return (args[0] * factor[:, :, None, None],)

    for feed in site.feeds:
        model.get_submodule(feed.module).register_forward_pre_hook(multiply)
    cross_entropy(model(batch["pixel_values"]).logits, batch["labels"], reduction="sum").backward()
    torch.testing.assert_close(seen[STEM], factor.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("criterion", ["fisher", "activation", "magnitude"])
@pytest.mark.parametrize("resource", ["macs", "parameters"])
def test_a_budget_is_met_within_one_percent(resource, criterion):
    model = zoo.tiny("image/mobilenet_v1")
    one = example_inputs(model, 1)
    cost = {"macs": lambda: macs(model, one), "parameters": lambda: count_parameters(model)}
    before = cost[resource]()
    hfslim.prune(
        model,
        [_batch(model)],
        target={resource: 0.5},
        units=["channels"],
        criterion=criterion,
        progress=False,
    )
    assert 0.495 <= cost[resource]() / before <= 0.5


def test_a_target_for_speech_counts_and_cuts_the_convolutions_in_front():
    model = zoo.tiny("audio/wav2vec2")
    one = example_inputs(model, 1, length=4000)
    batch = {**example_inputs(model, 4, seed=5, length=4000), "labels": torch.arange(4) % 3}
    before = macs(model, one)
    result = hfslim.prune(
        model,
        [batch],
        target={"macs": 0.8},
        inputs=one,
        units=["channels"],
        criterion="magnitude",
        progress=False,
    )
    assert 0.77 <= macs(model, one) / before <= 0.8
    kept, total = result.structure.counts()["channels"]
    widths = [layer.conv.weight.shape[0] for layer in model.wav2vec2.feature_extractor.conv_layers]
    assert sum(widths[:2]) == kept < total == 32
    assert widths[2] == 16


def test_a_sparsity_leaves_one_channel_everywhere():
    model = zoo.tiny("image/resnet")
    result = hfslim.prune(
        model, [_batch(model)], target={"sparsity": 0.85}, units=["channels"], progress=False
    )
    kept, total = result.structure.counts()["channels"]
    assert kept == total - round(0.85 * total)
    assert all(entry.kept for entry in result.structure)


def test_some_of_what_is_asked_for_is_refused():
    model = zoo.tiny("image/resnet")
    with pytest.raises(ValueError, match="at least one of the channels"):
        hfslim.shrink(model, Structure.of({"channels": {STEM: ([], 16)}}))
    for wrong, message in (
        ({"target": {"sparsity": 0.95}}, "one must stay in each of 10 places"),
        ({"target": {"macs": 0.5}, "uniform": True}, "uniform"),
    ):
        with pytest.raises(ValueError, match=message):
            hfslim.prune(model, [_batch(model)], units=["channels"], progress=False, **wrong)
    model = zoo.tiny("image/bit")
    with pytest.raises(ValueError, match="no heads, neurons and channels to score"):
        hfslim.prune(
            model,
            [_batch(model)],
            target={"macs": 0.96},
            units=["layers"],
            criterion="obs",
            progress=False,
        )


@torch.no_grad()
def test_batch_norms_take_their_statistics_anew():
    model = zoo.tiny("image/resnet")
    batches = [_batch(model, 4), _batch(model, 3)]
    norm = model.resnet.embedder.embedder.normalization
    seen = []
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    weights = {n: p.clone() for n, p in model.named_parameters()}
    assert renew_batch_norms(model, batches) == 14
    means, variances = zip(*[(x.mean((0, 2, 3)), x.var((0, 2, 3))) for x in seen], strict=True)
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0))
    assert norm.momentum == 0.1 and not norm.training
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["channels", "layers"])
@torch.no_grad()
def test_pruning_renews_batch_norms(kind):
    model = zoo.tiny("image/resnet")
    target = {"macs": 0.7} if kind == "channels" else {"sparsity": 0.5}
    result = hfslim.prune(
        model,
        [_batch(model)],
        target=target,
        units=[kind],
        criterion="magnitude",
        reconstruction="none",
        progress=False,
    )
    cut = zoo.tiny("image/resnet")
    hfslim.shrink(cut, result.structure)
    old, new = cut.state_dict(), model.state_dict()
    last = "resnet.encoder.stages.1.layers.0.layer.2.normalization.running_mean"
    assert not torch.equal(old[last], new[last])
    renew_batch_norms(cut, [_batch(model)])
    torch.testing.assert_close(cut.state_dict()[last], new[last])


STAYS = {
    "mobilenet_v2": [(0, 2, 5, 9, 12, 15)],
    "textnet": [(1,), (0,), (0,), (0,)],
    "bit": [(0,), (0,)],
    "swiftformer": [(), (), (), ()],
}


@pytest.mark.parametrize("family", STAYS)
def test_blocks_that_change_the_shape_or_add_nothing_stay(family):
    lists = [site for site in find_units(zoo.tiny(f"image/{family}")) if site.kind == "layers"]
    assert [site.fixed for site in lists] == STAYS[family]


@torch.no_grad()
def test_a_depth_that_the_config_tells_but_is_not_built_by_is_told_apart(tmp_path):
    """TextNet's config counts its layers, and its model is built by the sizes of kernels."""
    model = zoo.tiny("image/textnet")
    path, inputs = "textnet.encoder.stages.1.stage", example_inputs(model, 2)
    assert model.config.depths == [3, 4, 4, 4]
    hfslim.shrink(model, Structure.of({"layers": {path: ([0, 1, 3], 4)}}))
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert model.config.hfslim["layers"] == {path: [0, 1, 3]}
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


class TestAxes:
    def test_groups_tie_runs_of_entries(self):
        axes = Axes()
        units, inputs, outputs = axes.new(4), axes.new(8), axes.new(12)
        axes.group(inputs, units)
        axes.group(outputs, units)
        (one, narrow), (other, wide) = (axes.units(label[0].axis) for label in (inputs, outputs))
        assert (one, axes.size(one), narrow, wide) == (other, 4, 2, 3)

    def test_sizes_without_a_common_divisor_are_bound_together(self):
        axes = Axes()
        label, units = axes.new(9), axes.new(4)
        axes.group(label, units)
        assert axes.size(axes.units(label[0].axis)[0]) == 1

    def test_a_free_axis_becomes_the_row_that_it_meets(self):
        axes = Axes()
        row, weight = (*axes.new(3), *axes.new(5)), axes.new(8, free=True)
        axes.tie(row, weight)
        assert axes.resolve(weight) == row

    def test_rows_in_another_order_are_bound(self):
        axes = Axes()
        a, b = axes.new(3), axes.new(5)
        axes.tie((*a, *b), (*b, *a))
        assert "another order" in axes.reason(a[0].axis)

    def test_a_reason_goes_to_all_that_are_tied(self):
        axes = Axes()
        a, b, c = axes.new(6), axes.new(6), (Segment(axes.new(3)[0].axis, 2),)
        axes.bind([a], "why")
        axes.tie(a, b)
        axes.tie(b, c)
        assert axes.reason(c[0].axis) == "why"


def test_a_conv_net_of_ones_own_is_found(tmp_path):
    """Flattened maps, concatenations and a shared input, in names that nobody has heard of."""
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import ImageClassifierOutput

    class OwnConfig(PreTrainedConfig):
        model_type = "own_conv"
        image_size = 8

    class OwnModel(PreTrainedModel):
        config_class = OwnConfig
        main_input_name = "pixel_values"

        def __init__(self, config):
            super().__init__(config)
            self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 4, 1)
            self.mix = nn.Conv2d(10, 5, 3, padding=1)
            self.out = nn.Linear(5 * 64, 3)
            self.post_init()

        def forward(self, pixel_values):
            x = torch.cat([self.one(pixel_values).relu(), self.two(pixel_values).tanh()], 1)
            return ImageClassifierOutput(logits=self.out(self.mix(x).relu().flatten(1)))

    torch.manual_seed(0)
    model = OwnModel(OwnConfig()).eval()
    sites = {site.path: site for site in find_units(model)}
    assert {path: site.size for path, site in sites.items()} == {"one": 6, "two": 4, "mix": 5}
    assert (sites["two"].feeds[0].start, sites["mix"].feeds[0].width) == (6, 64)
    kept = {"one": ([1, 4], 6), "two": ([0], 4), "mix": ([0, 3], 5)}
    structure = Structure.of({"channels": kept})
    inputs = example_inputs(model, 2)
    with gated(model, structure):
        expected = model(**inputs).logits
    logits = hfslim.shrink(model, structure)(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert model.mix.weight.shape == (2, 3, 3, 3)
