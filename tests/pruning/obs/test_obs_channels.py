"""Channels go in the order of least loss, and the convolutions that take them make up for them."""

import logging
from dataclasses import replace

import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional
from transformers import RegNetForImageClassification, ResNetForImageClassification

import hfslim
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.structure import Structure
from hfslim.anatomy.units import Units
from hfslim.pruning.obs import matrix_layers
from hfslim.pruning.obs.elimination import Elimination, eliminate
from hfslim.pruning.obs.matrix_layers import MatrixLayer
from hfslim.pruning.obs.moments import gather
from hfslim.pruning.scores.batches import Batches
from hfslim.pruning.steps import calibrate, cut
from hfslim.pruning.surgery.batch_norms import renew_batch_norms


def _resnet(**settings):
    torch.manual_seed(0)
    config = zoo.tiny_config("resnet")
    config.embedding_size, config.hidden_sizes = 16, [16, 32]
    for name, value in settings.items():
        setattr(config, name, value)
    model = ResNetForImageClassification(config)
    renew_batch_norms(model, _data(model))
    return model.eval()


def _data(model, batches=3):
    torch.manual_seed(1)
    return [
        example_inputs(model, 16) | {"labels": torch.arange(16) % model.config.num_labels}
        for _ in range(batches)
    ]


CONVOLUTIONS = [
    nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=True),
    nn.Conv2d(3, 4, 1, stride=2),
    nn.Conv1d(3, 5, 4, stride=2, padding=1, dilation=2, bias=False),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=lambda conv: type(conv).__name__)
def test_a_convolution_is_the_matrix_that_it_is_laid_out_as(conv):
    layer = MatrixLayer("conv", conv, 1, conv.weight[0, 0].numel())
    x = torch.randn(2, 3, 9, 8) if isinstance(conv, nn.Conv2d) else torch.randn(2, 3, 17)
    with torch.no_grad():
        seen, expected = layer.positions(x, conv(x))
    found = seen @ layer.weight.T + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(found, expected)
    layer.put(2 * layer.weight)
    torch.testing.assert_close(layer.weight, conv.weight.detach().flatten(1))


def test_of_many_places_those_that_are_looked_at_stand_for_all(monkeypatch):
    monkeypatch.setattr(matrix_layers, "SAMPLED_POSITIONS", 200)
    torch.manual_seed(0)
    layer = MatrixLayer("conv", nn.Conv2d(2, 3, 3), 1, 9)
    x, g = torch.rand(4, 2, 32, 32), torch.rand(4, 3, 30, 30)
    seen, given = layer.positions(x, g)
    assert len(seen) == len(given) == 4 * 200
    torch.testing.assert_close(given.square().sum(), g.square().sum(), rtol=0.05, atol=0)
    half, _ = layer.positions(x[2:], g[2:])
    assert torch.equal(half, seen[400:])


def test_weights_that_lie_channels_last_are_put_too():
    conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    layer = MatrixLayer("conv", conv, 1, 9)
    layer.put(torch.ones(5, 27))
    assert torch.equal(conv.weight, torch.ones(5, 3, 3, 3))


def test_moments_of_a_convolution_are_those_of_what_it_sees_at_each_place(monkeypatch):
    """Against autograd, place by place."""
    monkeypatch.setattr(matrix_layers, "SAMPLED_POSITIONS", 10_000)
    model = _resnet(num_labels=2)
    units = find_units(model).of(["channels"])
    site = next(s for s in units if len(s.feeds) == 1)
    conv, (batch, *_) = model.get_submodule(site.gate), _data(model)
    seen = {}

    def keep(_, args, output):
        output.retain_grad()
        seen["x"], seen["y"] = args[0].detach(), output

    handle = conv.register_forward_hook(keep)
    p = (model(pixel_values=batch["pixel_values"]).logits / 2).softmax(-1)
    top = p.max(-1).values
    (2 * (top * (1 - top)).sqrt().detach() * (top / (1 - top)).log()).sum().backward()
    handle.remove()
    padded = functional.pad(seen["x"], (1, 1, 1, 1))
    gradient = seen["y"].grad
    second = torch.zeros(2, 2, dtype=torch.float64)
    for example in range(len(padded)):
        for row in range(gradient.shape[2]):
            for column in range(gradient.shape[3]):
                # The middle of what the kernel sees of the first two channels.
                place = padded[example, :2, row * conv.stride[0] + 1, column * conv.stride[1] + 1]
                weight = gradient[example, :, row, column].square().sum()
                second += (weight * torch.outer(place, place)).double()
    (found,) = gather(model, Units((site,)), [batch], progress=False)["channels", site.path]
    middles = torch.tensor([4, 13])
    torch.testing.assert_close(
        found.second[middles][:, middles], second, rtol=1e-4, atol=1e-6 * second.abs().max().item()
    )


def test_units_that_several_layers_take_go_by_the_sum_of_what_each_loses():
    torch.manual_seed(0)
    problems = []
    for width in (1, 4):
        x = torch.randn(6 * width, 100, dtype=torch.float64)
        w = torch.randn(3, 6 * width, dtype=torch.float64)
        problems.append((x @ x.T / 100, w.T @ w, width))
    order, costs = eliminate([Elimination(*p) for p in problems])
    alone = [
        [torch.linalg.solve(torch.linalg.inv(h)[s][:, s], b[s][:, s]).trace() for s in slices]
        for h, b, width in problems
        for slices in [[torch.arange(u * width, (u + 1) * width) for u in range(6)]]
    ]
    sums = torch.tensor(alone).sum(0)
    assert order[0] == int(sums.argmin())
    torch.testing.assert_close(costs[0], sums.min().to(costs))
    assert sorted(order) == list(range(6))


def _with_copies():
    """A model in which the channels inside each block come in pairs of equal ones."""
    model = _resnet()
    sites = [s for s in find_units(model).of(["channels"]) if len(s.feeds) == 1]
    with torch.no_grad():
        for site in sites:
            for one in site.cuts:
                if one.dim == 0:
                    tensor = getattr(model.get_submodule(one.module), one.tensor)
                    tensor[1::2] = tensor[::2]
    renew_batch_norms(model, _data(model))
    return model, sites


@torch.no_grad()
def test_what_takes_the_channels_that_stay_makes_up_for_the_others():
    """Against the convolution's own output, where what goes equals what stays."""
    (model, (site, *_)), (whole, _) = _with_copies(), _with_copies()
    data, kept = _data(model), tuple(range(0, site.size, 2))
    known = calibrate(
        model, Units((site,)), Batches(data, 48), {"channels": "fisher"}, progress=False
    )
    cut(model, Structure.of({"channels": {site.path: (kept, site.size)}}), known)
    x = []
    conv = whole.get_submodule(site.gate)
    handle = conv.register_forward_hook(lambda _, args, __: x.append(args[0]))
    for batch in data:
        whole(pixel_values=batch["pixel_values"])
    handle.remove()
    seen = torch.cat(x)
    expected = conv(seen)

    def error(weight):
        return (functional.conv2d(seen[:, kept], weight, padding=1) - expected).square().mean()

    assert error(model.get_submodule(site.gate).weight) < 0.01 * error(conv.weight[:, kept])


def test_of_equal_channels_one_goes_for_free():
    model, sites = _with_copies()
    data = _data(model)
    with torch.no_grad():
        expected = model(pixel_values=data[0]["pixel_values"]).logits
    known = calibrate(model, Units(tuple(sites)), Batches(data, 48), {"channels": "obs"})
    kept = {}
    for site in sites:
        scores = known.scores["channels", site.path]
        kept[site.path] = sorted(scores.topk(site.size // 2).indices.tolist()), site.size
        assert {index // 2 for index in kept[site.path][0]} == set(range(site.size // 2))
    errors = {}
    for how in ("weights", "none"):
        small, _ = _with_copies()
        cut(small, Structure.of({"channels": kept}), replace(known, reconstruction=how))
        with torch.no_grad():
            found = small(pixel_values=data[0]["pixel_values"]).logits
        errors[how] = (found - expected).abs().max().item()
    assert errors["weights"] < 0.1 * errors["none"]


def test_obs_is_usual_for_channels_and_for_the_layers_around_them(caplog):
    model = _resnet(depths=[3, 3])
    with caplog.at_level(logging.INFO):
        result = hfslim.prune(
            model, _data(model), {"macs": 0.5}, ["channels", "layers"], progress=False
        )
    scores = result.scores
    (first, second) = [key for key in scores if key[0] == "layers"]
    inside = [s for s in find_units(_resnet(depths=[3, 3])) if s.layer == f"{first[1]}.1"]
    assert inside and first != second
    torch.testing.assert_close(
        scores[first][1], sum(scores["channels", s.path].sum() for s in inside)
    )


def test_layers_by_another_criterion_need_nothing_that_obs_scores_in_them():
    model = zoo.tiny("text/albert")
    data = [example_inputs(model, 4, length=8) | {"labels": torch.arange(4) % 2}]
    criteria = {"neurons": "obs", "layers": "magnitude"}
    known = calibrate(
        model,
        find_units(model).of(["neurons", "layers"]),
        Batches(data, 4),
        criteria,
        progress=False,
    )
    assert {kind for kind, _ in known.scores} == {"neurons", "layers"}
    with pytest.raises(ValueError, match="runs of the same module"):
        calibrate(
            model,
            find_units(model).of(["neurons", "layers"]),
            Batches(data, 4),
            criteria | {"layers": "obs"},
            progress=False,
        )


def test_channels_without_a_matrix_are_scored_by_fisher_at_the_scale_of_obs(caplog):
    torch.manual_seed(0)
    config = zoo.tiny_config("regnet")
    config.groups_width = 4
    model = RegNetForImageClassification(config).eval()
    renew_batch_norms(model, _data(model))
    units = find_units(model).of(["channels"])
    with caplog.at_level(logging.WARNING):
        known = calibrate(
            model, units, Batches(_data(model), 48), {"channels": "obs"}, progress=False
        )
    assert "scored by fisher, brought to the scale of obs" in caplog.text
    assert known.scores.keys() == {("channels", s.path) for s in units}
    fisher = calibrate(
        model,
        units,
        Batches(_data(model), 48),
        {"channels": "fisher"},
        progress=False,
        reconstruction="none",
    ).scores
    known_by_obs = {("channels", s.path) for s in known.moments.units}
    others = known.scores.keys() - known_by_obs
    assert known_by_obs and others
    scale = sum(known.scores[k].sum() for k in known_by_obs) / sum(
        fisher[k].sum() for k in known_by_obs
    )
    for key in others:
        torch.testing.assert_close(known.scores[key], scale * fisher[key], rtol=1e-6, atol=0)
