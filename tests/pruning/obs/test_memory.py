"""Calibration where memory is short."""

import logging
import re
import weakref

import pytest
import torch
import zoo
from models import tiny

import hfslim
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.pruning.family import prune_family
from hfslim.pruning.obs import memory_budget
from hfslim.pruning.obs.moments import InputMoments, Moments, gather
from hfslim.pruning.scores.collect import collect
from hfslim.pruning.scores.layers import loss_delta
from hfslim.pruning.surgery.batch_norms import renew_batch_norms


class _Small:
    """Lets a model run out of memory on more examples than fit, in the last of its layers."""

    def __init__(self, model: torch.nn.Module, fits: int, device: str = "CUDA") -> None:
        self.fits, self.device, self.sizes = fits, device, []
        model.bert.encoder.layer[-1].register_forward_pre_hook(self)

    def __call__(self, module: torch.nn.Module, args: tuple) -> None:
        self.sizes.append(len(args[0]))
        if len(args[0]) > self.fits:
            if self.device == "CPU":
                torch.empty(2**50)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _batches(sizes: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    model = tiny("bert")
    batch = example_inputs(model, batch_size=sum(sizes), length=8)
    batch["labels"] = torch.arange(sum(sizes)) % 3
    parts = zip(*(value.split(sizes) for value in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


@pytest.mark.parametrize(
    ("criterion", "device", "reason"),
    [
        ("fisher", "CUDA", "CUDA out of memory"),
        ("activation", "CUDA", "CUDA out of memory"),
        ("fisher", "CPU", r"\[enforce fail at .*can't allocate memory"),
    ],
)
def test_batches_that_do_not_fit_are_halved_with_a_warning(criterion, device, reason, caplog):
    criteria = {"heads": criterion, "neurons": criterion}
    model, small = tiny("bert"), tiny("bert")
    units = find_units(model).of(["heads", "neurons"])
    expected = collect(model, units, _batches((2, 10)), criteria, progress=False)
    memory = _Small(small, 3, device)
    with caplog.at_level(logging.WARNING, "hfslim"):
        found = collect(small, units, _batches((2, 10)), criteria, progress=False)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-9)
    assert memory.sizes == [2, 10, 2, 5, 2, 3, 3, 3, 1]
    assert re.search(rf"out of memory on 10 examples at once \({reason}", caplog.text)
    assert "starting anew with 3" in caplog.text


def test_second_moments_are_the_same_in_halves():
    model, small = tiny("bert"), tiny("bert")
    units = find_units(model).of(["heads", "neurons"])
    expected = gather(model, units, _batches((8,)), progress=False)
    _Small(small, fits=4)
    found = gather(small, units, _batches((8,)), progress=False)
    for key, (value,) in expected.items():
        torch.testing.assert_close(found[key][0].second, value.second, rtol=1e-4, atol=1e-8)
        assert found[key][0].examples == value.examples == 8


def test_losses_without_layers_are_the_same_in_halves(caplog):
    model, small = tiny("bert"), tiny("bert")
    units = find_units(model).of(["layers"])
    expected = loss_delta(model, units, _batches((8,)))
    memory = _Small(small, fits=4)
    found = loss_delta(small, units, _batches((8,)))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-8)
    # They are halved once, not anew for each layer.
    assert memory.sizes.count(8) == 1 and caplog.text.count("starting anew") == 1


def test_statistics_of_batch_norms_are_those_of_halves():
    model, small = zoo.tiny("image/resnet"), zoo.tiny("image/resnet")
    batch = example_inputs(model, batch_size=8)
    halves = [
        {name: value[part] for name, value in batch.items()} for part in (slice(4), slice(4, 8))
    ]
    renew_batch_norms(model, halves)

    def small_memory(module: torch.nn.Module, args: tuple) -> None:
        if len(args[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    list(small.modules())[-1].register_forward_pre_hook(small_memory)
    renew_batch_norms(small, [batch])
    state = small.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_where_single_examples_do_not_fit_the_error_stays():
    model = tiny("bert")
    _Small(model, fits=0)
    with pytest.raises(torch.OutOfMemoryError):
        hfslim.prune(model, _batches((4,)), {"macs": 0.5}, criterion="fisher", progress=False)


LAYER = 8 * (48**2 + 32**2 + 2 * 32**2)
"""Bytes of the second moments of one layer of the tiny BERT."""


class _Held:
    """Notes how many bytes of second moments there are at once, and leaves little room for them."""

    def __init__(self, monkeypatch, kind, leaves):
        self.most, self._seen, made = 0, [], kind.zeros.__func__
        monkeypatch.setattr(memory_budget, "LEAST_BUDGET", leaves)
        monkeypatch.setattr(memory_budget, "MODEL_FRACTION", 0.0)

        def zeros(cls, *args):
            one = made(cls, *args)
            self._seen += [weakref.ref(t) for t in vars(one).values() if t.ndim == 2]
            alive = [t for ref in self._seen if (t := ref()) is not None]
            self.most = max(self.most, sum(t.numel() * 8 for t in alive))
            return one

        monkeypatch.setattr(kind, "zeros", classmethod(zeros))


def _outcome(**how):
    model = tiny("bert")
    if "fractions" in how:
        members, scores = prune_family(model, _batches((4, 4)), progress=False, **how), {}
    else:
        how = {"target": {"macs": 0.5}, "progress": False, **how}
        members = [hfslim.prune(model, _batches((4, 4)), **how)]
        scores = members[0].scores
    return [m.structure for m in members], scores, [m.model.state_dict() for m in members]


@pytest.mark.parametrize(
    ("how", "passes"),
    [
        ({"reconstruction": "none"}, 1),
        ({"reconstruction": "scales", "units": ("heads", "neurons", "layers")}, 2),
        ({"criterion": "fisher"}, 1),
        ({"fractions": (0.75, 0.5)}, 3),
    ],
)
def test_moments_in_groups_give_what_they_give_at_once(monkeypatch, caplog, how, passes):
    expected = _outcome(**how)
    held = _Held(monkeypatch, Moments, leaves=LAYER)
    with caplog.at_level(logging.INFO, "hfslim"):
        structures, scores, states = _outcome(**how)
    assert structures == expected[0]
    assert all(torch.equal(scores[key], value) for key, value in expected[1].items())
    for state, other in zip(states, expected[2], strict=True):
        assert state.keys() == other.keys()
        assert all(torch.equal(state[name], value) for name, value in other.items())
    assert held.most == LAYER
    assert caplog.text.count("3 passes over the calibration data") == passes


def test_moments_that_fit_are_gathered_once_for_scores_and_reconstruction(monkeypatch, caplog):
    held = _Held(monkeypatch, Moments, leaves=3 * LAYER)
    with caplog.at_level(logging.INFO, "hfslim"):
        _outcome()
    assert held.most == 3 * LAYER
    assert len(held._seen) == 2 * 6
    assert "passes" not in caplog.text


def test_a_quarter_of_a_large_model_may_be_moments(monkeypatch):
    monkeypatch.setattr(memory_budget, "LEAST_BUDGET", 100)
    assert memory_budget.statistics_budget(torch.nn.Linear(10, 100, bias=False)) == 1000
    assert memory_budget.statistics_budget(torch.nn.Linear(1, 1)) == 100


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_single_weights_are_the_same_with_moments_in_groups(monkeypatch, method):
    def outcome():
        model = tiny("bert")
        found = hfslim.sparsify(model, _batches((4, 4)), 0.5, method=method, progress=False)
        return found.errors, model.state_dict()

    errors, expected = outcome()
    largest = 8 * 48**2
    held = _Held(monkeypatch, InputMoments, leaves=largest)
    again, found = outcome()
    assert again == errors
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert held.most == largest
