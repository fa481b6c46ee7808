from itertools import pairwise

import pytest
import torch
from models import tiny
from torch.nn.functional import cross_entropy

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.pruning.scores import importance
from hfslim.pruning.scores.batches import Batches
from hfslim.pruning.scores.collect import collect
from hfslim.pruning.scores.criteria import criteria_by_kind
from hfslim.pruning.scores.importance import Scores

HEADS = ("heads", "bert.encoder.layer.1.attention.self")
LAYERS = ("layers", "bert.encoder.layer")


def _batch(model, size=4, length=8, seed=0):
    inputs = example_inputs(model, size, seed, length)
    return inputs | {"labels": torch.arange(size) % 3}


def _collect(model, data, criterion, kinds=("heads", "neurons"), **options):
    units = find_units(model).of(kinds)
    criteria = criteria_by_kind(criterion, kinds)
    return collect(model, units, data, criteria, progress=False, **options)


def _head_gradients(model, inputs, labels):
    """`∂L/∂ξ` of the heads of one layer by `W · ∂L/∂W`, example by example."""
    rows = []
    weight = model.get_submodule("bert.encoder.layer.1.attention.output.dense").weight
    for example in range(len(labels)):
        one = {name: value[example : example + 1] for name, value in inputs.items()}
        loss = cross_entropy(model(**one).logits, labels[example : example + 1])
        (grad,) = torch.autograd.grad(loss, [weight])
        rows.append((weight * grad).reshape(-1, 4, 8).sum((0, 2)))
    return torch.stack(rows).detach().double()


def test_fisher_is_the_mean_of_each_examples_squared_gradient():
    model = tiny("bert")
    batch = _batch(model)
    scores = _collect(model, [batch], "fisher")
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    gradients = _head_gradients(model, inputs, batch["labels"])
    torch.testing.assert_close(scores[HEADS], gradients.square().mean(0), rtol=1e-4, atol=1e-9)
    of_batch = gradients.mean(0).square()
    assert not torch.allclose(scores[HEADS], of_batch, rtol=0.1)


def test_taylor_is_the_mean_absolute_gradient_at_norm_one_per_site():
    model = tiny("bert")
    batch = _batch(model)
    scores = _collect(model, [batch], "taylor")
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    expected = _head_gradients(model, inputs, batch["labels"]).abs().mean(0)
    torch.testing.assert_close(scores[HEADS], expected / expected.norm(), rtol=1e-4, atol=1e-9)


def test_batch_size_does_not_matter():
    model = tiny("bert")
    batch = _batch(model)
    one_by_one = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    whole, parts = (_collect(model, data, "fisher") for data in ([batch], one_by_one))
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=1e-10)


def test_no_more_examples_are_used_than_asked_for():
    model = tiny("bert")
    batch = _batch(model)
    first = {k: v[:3] for k, v in batch.items()}
    limited = _collect(model, Batches([batch, batch], 3), "fisher")
    expected = _collect(model, [first], "fisher")
    for key, value in expected.items():
        torch.testing.assert_close(limited[key], value, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize(
    ("criterion", "kinds"),
    [
        ("activation", ("heads", "neurons")),
        ("activation", ("layers",)),
        ("block_influence", ("layers",)),
    ],
)
def test_padding_does_not_count(criterion, kinds):
    model = tiny("bert")
    batch = _batch(model)
    padded = {k: torch.nn.functional.pad(v, (0, 5)) for k, v in batch.items() if k != "labels"}
    short = _collect(model, [batch], criterion, kinds)
    long = _collect(model, [padded], criterion, kinds)
    for key, value in short.items():
        torch.testing.assert_close(long[key], value, rtol=1e-4, atol=1e-8)


def test_activation_is_the_mean_norm_of_what_the_projection_gets():
    model = tiny("bert")
    batch = _batch(model)
    fed = []
    module = model.get_submodule("bert.encoder.layer.1.output.dense")
    handle = module.register_forward_pre_hook(lambda _, args: fed.append(args[0].detach()))
    scores = _collect(model, [batch], "activation")
    handle.remove()
    expected = fed[0].double().norm(dim=1).mean(0)
    found = scores["neurons", "bert.encoder.layer.1"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_block_influence_is_one_minus_the_cosine_of_input_and_output():
    model = tiny("bert")
    batch = _batch(model)
    scores = _collect(model, [batch], "block_influence", ("layers",))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    expected = [
        1 - torch.cosine_similarity(before, after, dim=-1).mean().item()
        for before, after in pairwise(states)
    ]
    assert scores[LAYERS].tolist() == pytest.approx(expected, rel=1e-4)


def test_magnitude_is_the_norm_of_the_weights_in_and_out():
    model = tiny("bert")
    units = find_units(model)
    scores = importance.magnitude(model, units)
    layer = model.bert.encoder.layer[1]
    attention, rows = layer.attention, slice(8, 16)
    parts = [attention.output.dense.weight[:, rows]]
    for project in (attention.self.query, attention.self.key, attention.self.value):
        parts += [project.weight[rows], project.bias[rows]]
    expected = torch.cat([p.flatten() for p in parts]).double().norm().item()
    assert scores[HEADS][1].item() == pytest.approx(expected, rel=1e-6)
    parts = [layer.intermediate.dense.weight[5], layer.intermediate.dense.bias[5:6]]
    expected = torch.cat([*parts, layer.output.dense.weight[:, 5]]).double().norm().item()
    assert scores["neurons", "bert.encoder.layer.1"][5].item() == pytest.approx(expected, rel=1e-6)
    expected = torch.cat([p.flatten() for p in layer.parameters()]).double().norm().item()
    assert scores[LAYERS][1].item() == pytest.approx(expected, rel=1e-6)


def test_magnitude_of_a_fused_projection_takes_every_block():
    model = tiny("modernbert")
    scores = importance.magnitude(model, find_units(model))
    attention, rows = model.model.layers[1].attn, [8, 16]
    fused = attention.Wqkv.weight.reshape(3, 32, -1)[:, slice(*rows)]
    parts = [fused.flatten(), attention.Wo.weight[:, slice(*rows)].flatten()]
    found = scores["heads", "model.layers.1.attn"][1].item()
    assert found == pytest.approx(torch.cat(parts).double().norm().item(), rel=1e-6)


def test_random_scores_follow_the_seed():
    units = find_units(tiny("bert"))
    one, same, other = (importance.random_scores(units, seed) for seed in (0, 0, 1))
    assert torch.equal(one[HEADS], same[HEADS])
    assert not torch.equal(one[HEADS], other[HEADS])


def test_scores_without_data_do_not_touch_it():
    model = tiny("bert")
    scores = _collect(model, iter(()), {"heads": "magnitude", "neurons": "random"})
    totals = {"heads": 0.0, "neurons": 0.0}
    for (kind, _), value in scores.items():
        totals[kind] += value.sum().item()
    assert totals == pytest.approx({"heads": 1.0, "neurons": 1.0})


def test_scoring_leaves_the_model_as_it_was():
    model = tiny("bert").train()
    model.bert.embeddings.requires_grad_(False)
    frozen = [p.requires_grad for p in model.parameters()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    _collect(model, [_batch(model)], "fisher")
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class TestScores:
    def test_mean_divides_by_the_examples(self):
        scores = Scores({HEADS: torch.tensor([2.0, 6.0])}, count=4)
        assert scores.mean()[HEADS].tolist() == [0.5, 1.5]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_non_finite_scores_are_refused_by_site(self, bad):
        with pytest.raises(ValueError, match=r"heads at 'bert.* are not finite"):
            Scores({HEADS: torch.tensor([1.0, bad])}, 1).mean()

    def test_no_examples_are_refused(self):
        with pytest.raises(ValueError, match="calibration data is empty"):
            Scores({HEADS: torch.zeros(2)}, 0).mean()

    def test_one_process_reduces_to_itself(self):
        scores = Scores({HEADS: torch.ones(2)}, 1)
        assert scores.reduce() is scores


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("hessian", "criterion for heads: got 'hessian', expected one of"),
        ({"heads": "fisher"}, "criterion for layers: got None"),
        ("block_influence", "block_influence scores layers, not heads"),
    ],
)
def test_criteria_that_do_not_fit_are_refused(criterion, message):
    with pytest.raises(ValueError, match=message):
        criteria_by_kind(criterion, ("heads", "layers"))
