import copy

import pytest
import torch
from models import tiny
from structures import Unchanged

import hfslim
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.structure import Structure
from hfslim.pruning import UnusableScoresError, steps
from hfslim.pruning.obs.elimination import Elimination, eliminate, refit, rescale
from hfslim.pruning.obs.moments import InputMoments, SecondMoments, gather
from hfslim.pruning.obs.reconstruction import layer_scores, obs_scores
from hfslim.pruning.scores.batches import Batches

NARROW = ("heads", "neurons")


def _data(model, examples=16, batch=4, length=8):
    whole = example_inputs(model, examples, 0, length)
    return [{k: v[i : i + batch] for k, v in whole.items()} for i in range(0, examples, batch)]


def _case(units, width, outputs=4):
    """A random projection, inputs that depend on each other, and a metric of the outputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(units * width, 3 * units * width) + draw(1, 3 * units * width)
    root = draw(outputs, outputs)
    return draw(outputs, units * width), x, root @ root.T


def _least_error(weight, x, metric, kept, width):
    """The error of the best weights on what is kept, by a solver that knows nothing of OBS."""
    rows = [u * width + i for u in kept for i in range(width)]
    rest = weight @ x
    if rows:
        rest = rest - torch.linalg.lstsq(x[rows].T, rest.T).solution.T @ x[rows]
    return torch.trace(metric @ rest @ rest.T).item() / x.shape[1]


@pytest.mark.parametrize(("units", "width"), [(9, 1), (5, 3), (80, 1)])
def test_each_unit_that_goes_is_the_cheapest_by_least_squares(units, width):
    weight, x, metric = _case(units, width)
    order, costs = eliminate([Elimination(x @ x.T / x.shape[1], weight.T @ metric @ weight, width)])
    assert sorted(order) == list(range(units))
    left, lost = list(range(units)), 0.0
    for unit, cost in zip(order, costs.tolist(), strict=True):
        tries = left if units < 80 else [unit]
        errors = {
            u: _least_error(weight, x, metric, [v for v in left if v != u], width) for u in tries
        }
        assert min(errors, key=errors.__getitem__) == unit
        assert errors[unit] - lost == pytest.approx(cost, rel=1e-6, abs=1e-9)
        left.remove(unit)
        lost = errors[unit]


def test_the_weights_that_stay_equal_exact_least_squares():
    weight, x, _ = _case(7, 1)
    kept = torch.tensor([0, 2, 5])
    expected = torch.linalg.lstsq(x[kept].T, (weight @ x).T).solution.T
    new = refit(weight, x @ x.T / x.shape[1], kept)
    torch.testing.assert_close(new[:, kept], expected)
    assert not new[:, [1, 3, 4, 6]].any()


def test_weights_that_are_zero_stay_zero_and_the_others_of_the_row_make_up():
    weight, x, _ = _case(7, 1)
    weight[0, 2] = weight[1, 0] = weight[1, 5] = 0
    new = refit(weight, x @ x.T / x.shape[1], torch.tensor([0, 2, 5, 6]))
    for row, kept in enumerate(([0, 5, 6], [2, 6], [0, 2, 5, 6], [0, 2, 5, 6])):
        expected = torch.linalg.lstsq(x[kept].T, (weight[row] @ x).unsqueeze(1)).solution
        torch.testing.assert_close(new[row, kept], expected.flatten())
        assert new[row].count_nonzero() == len(kept)


def test_scales_equal_exact_least_squares_over_the_outputs_of_units():
    weight, x, _ = _case(4, 2)
    kept = torch.tensor([1, 3])
    outputs = [(weight[:, 2 * u : 2 * u + 2] @ x[2 * u : 2 * u + 2]).flatten() for u in range(4)]
    expected = torch.linalg.lstsq(
        torch.stack([outputs[1], outputs[3]], 1), torch.stack(outputs).sum(0).unsqueeze(1)
    ).solution.flatten()
    torch.testing.assert_close(rescale(weight, x @ x.T / x.shape[1], kept, 2), expected)


def test_moments_of_parts_add_up_to_those_of_the_whole():
    model = tiny("bert")
    units = find_units(model).of(NARROW)
    data = _data(model)
    whole = gather(model, units, data, progress=False)
    parts = [gather(model, units, part, progress=False) for part in (data[:1], data[1:])]
    for key, (total,) in whole.items():
        for name, value in vars(total).items():
            added = sum(getattr(part[key][0], name) for part in parts)
            torch.testing.assert_close(added, value, rtol=1e-6, atol=1e-6 * value.abs().max())


def test_moments_are_those_of_the_inputs_weighed_by_gradients():
    """Against autograd on one projection, example by example."""
    model = tiny("bert", num_labels=2)
    path = "bert.encoder.layer.1.output.dense"
    module = model.get_submodule(path)
    second = torch.zeros(48, 48, dtype=torch.float64)
    for batch in _data(model, batch=1):
        seen = {}

        def keep(_, args, output, seen=seen):
            output.retain_grad()
            seen["x"], seen["y"] = args[0].detach()[0], output

        handle = module.register_forward_hook(keep)
        p = (model(**batch).logits / 2).softmax(-1)[0]
        top = p.argmax()
        (2 * (p[top] * (1 - p[top])).sqrt().detach() * (p[top] / (1 - p[top])).log()).backward()
        handle.remove()
        for x, g in zip(seen["x"], seen["y"].grad[0], strict=True):
            second += (g.square().sum() * torch.outer(x, x)).double()
    units = find_units(model).of(["neurons"])
    found = gather(model, units, _data(model), progress=False)
    torch.testing.assert_close(
        found["neurons", "bert.encoder.layer.1"][0].second, second, rtol=1e-4, atol=1e-9
    )


def test_padding_counts_nothing():
    model = tiny("bert")
    units = find_units(model).of(NARROW)
    short = example_inputs(model, 2, length=5) | {"attention_mask": torch.ones(2, 5)}
    padded = {k: torch.nn.functional.pad(v, (0, 6)) for k, v in short.items()}
    one, other = (gather(model, units, [b], progress=False) for b in (short, padded))
    for key, (total,) in one.items():
        for name, value in vars(total).items():
            scale = value.abs().max()
            torch.testing.assert_close(
                getattr(other[key][0], name), value, rtol=1e-4, atol=1e-5 * scale
            )


def test_copies_of_neurons_go_for_free():
    """Half of the neurons repeat the others: without them the model says the same."""
    model = tiny("bert")
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            dense = layer.intermediate.dense
            dense.weight[24:], dense.bias[24:] = dense.weight[:24], dense.bias[:24]
        batch = example_inputs(model, 4, 1, length=8)
        expected = model(**batch).logits
        plain = copy.deepcopy(model)
        target = {"sparsity": {"neurons": 0.5}}
        hfslim.prune(model, _data(model), target, ("neurons",), progress=False)
        hfslim.prune(
            plain, _data(plain), target, ("neurons",), progress=False, reconstruction="none"
        )
        lost, lost_plain = (
            (m(**batch).logits - expected).abs().max().item() for m in (model, plain)
        )
    assert sum(layer.output.dense.in_features for layer in model.bert.encoder.layer) == 72
    assert lost < 0.3 * lost_plain


@pytest.mark.parametrize("family", ["bert", "vit", "whisper", "qwen2", "modernbert", "wavlm"])
def test_reconstruction_brings_the_model_closer(family):
    model = tiny(family)
    data = _data(model, 32, 8, 800 if family == "wavlm" else 8)
    closeness = {}
    with torch.no_grad():
        expected = torch.cat([model(**b).logits for b in data])
        for how in ("weights", "scales", "none"):
            small = copy.deepcopy(model)
            options = {"criterion": "magnitude", "reconstruction": how, "progress": False}
            hfslim.prune(small, data, {"sparsity": 0.4}, NARROW, **options)
            found = torch.cat([small(**b).logits for b in data])
            closeness[how] = (found - expected).norm().item()
    assert closeness["weights"] < 0.8 * closeness["none"]
    assert closeness["weights"] < closeness["scales"] != closeness["none"]


def test_a_layer_scores_the_sum_of_what_is_in_it():
    model = tiny("bert")
    units = find_units(model)
    scores = obs_scores(model, SecondMoments(units.of(NARROW), _data(model), False))
    scores |= layer_scores(units, scores)
    inside = [s for s in units if s.layer == "bert.encoder.layer.1"]
    assert len(inside) == 2
    expected = sum(scores[s.kind, s.path].sum() for s in inside)
    torch.testing.assert_close(scores["layers", "bert.encoder.layer"][1], expected)


def test_the_activation_that_is_not_finite_is_named():
    model = tiny("bert")
    model.bert.encoder.layer[1].intermediate.dense.weight.data[0, 0] = float("inf")
    with pytest.raises(UnusableScoresError, match=r"layer\.1\.intermediate\.dense' is not"):
        hfslim.prune(model, _data(model), {"macs": 0.5}, progress=False)


def test_a_cut_that_fails_leaves_the_weights_as_they_were(monkeypatch):
    model = tiny("bert")
    units = find_units(model).of(NARROW)
    criteria = dict.fromkeys(NARROW, "obs")
    calibration = steps.calibrate(model, units, Batches(_data(model), 16), criteria, progress=False)
    path = "bert.encoder.layer.1"
    structure = Structure.of({"neurons": {path: (range(10), 48)}})
    before = model.get_submodule(path).output.dense.weight[:, :10].clone()

    def fail(*_):
        assert not torch.isclose(
            model.get_submodule(path).output.dense.weight[:, :10], before
        ).any()
        raise RuntimeError("differs")

    monkeypatch.setattr(steps, "shrink", fail)
    with Unchanged(model), pytest.raises(RuntimeError, match="differs"):
        steps.cut(model, structure, calibration)


def test_an_unknown_reconstruction_is_refused():
    model = tiny("bert")
    with Unchanged(model), pytest.raises(ValueError, match="reconstruction must be one of"):
        hfslim.prune(model, _data(model), {"macs": 0.5}, reconstruction="all", progress=False)


def test_inputs_that_are_all_alike_have_a_covariance_to_solve_with():
    torch.manual_seed(0)
    x = torch.randn(1, 48).repeat(40, 1)
    moments = InputMoments.zeros(x.device, (), (48,), (48, 48))
    moments.add_inputs(x, torch.rand(40))
    # About their mean nothing is left of them but the rounding of float32, negative at times.
    torch.linalg.cholesky(moments.covariance(centred=True))
