"""What surgery keeps until a cut is checked: all that was cut off, and nothing twice."""

import gc
import json
import os
import subprocess
import sys

import pytest
import torch
import zoo
from models import tiny
from places import ROOT
from structures import uneven

import hfslim
from benchmarks.peak import RESET
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.structure import KINDS
from hfslim.pruning.surgery import surgery
from hfslim.pruning.surgery.proof import attention_returns
from hfslim.pruning.surgery.reversible_slices import ReversibleSlices

CASES = {
    "two dimensions": ("bert", ("heads", "neurons", "dimensions")),
    "buffers": ("swin", KINDS[:-1]),
    "weight norm": ("wav2vec2", ("channels", "heads", "neurons")),
    "batch norms": ("image/resnet", ("channels",)),
    "shared": ("text/zamba", ("neurons",)),
    "experts": ("text/mixtral", ("experts", "neurons")),
}


def _case(name):
    family, kinds = CASES[name]
    model = zoo.tiny(family) if "/" in family else tiny(family)
    return model, uneven(model, drop_layer=False, kinds=kinds)


class Untouched:
    """Checks that a block leaves every tensor of a model the same object, with all its values."""

    def __init__(self, model):
        self.model = model
        self.tensors = self._named()
        self.values = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        self.layouts = {name: tensor.stride() for name, tensor in self.tensors.items()}

    def _named(self):
        both = (self.model.named_parameters, self.model.named_buffers)
        return {name: one for named in both for name, one in named(remove_duplicate=False)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        now = self._named()
        assert list(now) == list(self.tensors)
        assert all(now[name] is one for name, one in self.tensors.items())
        self.check()

    def check(self):
        for name, one in self.tensors.items():
            assert one.stride() == self.layouts[name], name
            assert torch.equal(one.detach(), self.values[name]), name


def _live():
    """Bytes of all tensors that there are."""
    storages = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, torch.nn.Parameter):
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _size(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_a_cut_that_is_taken_back_leaves_every_tensor_as_it_was(monkeypatch, name):
    model, structure = _case(name)
    cut = []

    def fail(*_):
        cut.append(_size(model))
        raise OSError("disk full")

    monkeypatch.setattr(surgery.blueprint, "describe", fail)
    whole = _size(model)
    with Untouched(model), pytest.raises(OSError, match="disk full"):
        hfslim.shrink(model, structure)
    assert cut[0] < whole


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_an_interrupt_half_way_leaves_every_tensor_as_it_was(monkeypatch, name, part):
    model, structure = _case(name)
    select, calls = ReversibleSlices.select, []

    def counted(*args):
        calls.append(args)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return select(*args)

    monkeypatch.setattr(ReversibleSlices, "select", counted)
    units, stop = find_units(model, structure.has("dimensions")), 0
    structure, returns = units.complete(structure), attention_returns(model, units)
    with Untouched(model), surgery.cut_for_now(model, units, structure, returns):
        pass
    stop, calls[:] = max(int(part * len(calls)), 2), []
    with Untouched(model), pytest.raises(KeyboardInterrupt):
        hfslim.shrink(model, structure)
    assert len(calls) == stop


def test_gradients_and_trainability_come_back():
    model, structure = _case("two dimensions")
    model.bert.encoder.layer[0].requires_grad_(False)
    inputs = example_inputs(model)
    model(**inputs).logits.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    units = find_units(model, dimensions=True)
    one = surgery._Surgery(model, sparing=True)
    one.cut(units, units.complete(structure), attention_returns(model, units))
    one.undo()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[n], g) for n, g in gradients.items())
    assert not model.bert.encoder.layer[0].attention.self.query.weight.requires_grad


def test_what_others_hold_of_the_old_tensors_stays_whole():
    model, structure = _case("two dimensions")
    state = model.state_dict()
    values = {name: value.clone() for name, value in state.items()}
    held = Untouched(model)
    hfslim.shrink(model, structure)
    held.check()
    assert all(torch.equal(state[name], value) for name, value in values.items())
    assert _size(model) < sum(p.numel() * p.element_size() for p in held.tensors.values())


def test_a_parameter_that_another_module_uses_uncut_is_whole_again():
    model = tiny("bert")
    first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer[:2])
    second.weight = first.weight
    before = first.weight.detach().clone()
    slices = ReversibleSlices(model, sparing=True)
    first.weight = slices.select(second.weight, 0, torch.arange(7))
    assert second.weight.numel() == 0
    slices.restore_used(model)
    assert torch.equal(second.weight, before)
    assert torch.equal(first.weight, before[:7])


def test_tensors_in_memory_that_others_share_are_left_alone():
    model = tiny("bert")
    dense = model.bert.encoder.layer[0].intermediate.dense
    model.register_buffer("twin", dense.weight.detach(), persistent=False)
    one = ReversibleSlices(model, sparing=True)
    kept = one.select(dense.weight, 0, torch.tensor([1, 3]))
    assert torch.equal(kept, model.twin[[1, 3]])
    assert dense.weight.data_ptr() == model.twin.data_ptr()
    assert dense.weight.shape == model.twin.shape


def test_nothing_is_held_twice_while_a_cut_is_checked(monkeypatch):
    model = tiny("bert", hidden_size=128, intermediate_size=512)
    structure = uneven(model, drop_layer=False)
    gc.collect()  # What earlier tests left must not go meanwhile.
    whole, before, largest = _size(model), _live(), 128 * 512 * 4
    select, check, cutting, checked = ReversibleSlices.select, surgery.check_equal, [], []

    def watched(*args):
        kept = select(*args)
        cutting.append(_live() - before)
        return kept

    def measured(*args):
        checked.append(_live() - before)
        check(*args)

    monkeypatch.setattr(ReversibleSlices, "select", watched)
    monkeypatch.setattr(surgery, "check_equal", measured)
    hfslim.shrink(model, structure)
    assert _size(model) < 0.7 * whole
    assert max(cutting) < largest
    # The inputs and the numbers of what stays are all that comes on top.
    assert max(checked) < 0.02 * whole
    assert _live() - before == pytest.approx(_size(model) - whole, abs=0.02 * whole)


def test_a_cut_for_now_moves_nothing():
    model, structure = _case("two dimensions")
    units = find_units(model, dimensions=True)
    where = {n: p.data_ptr() for n, p in model.named_parameters()}
    structure, returns = units.complete(structure), attention_returns(model, units)
    whole = _size(model)
    with Untouched(model), surgery.cut_for_now(model, units, structure, returns):
        assert _size(model) < whole
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == where


@pytest.mark.skipif(not RESET.exists(), reason="the peak is only told on Linux")
def test_a_model_is_scored_cut_and_saved_in_little_more_than_its_own_memory():
    command = [sys.executable, "-m", "benchmarks.memory", "--one", "small", "fisher"]
    # Each further thread would have buffers of its own.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    whole = found["model"]
    assert whole > 100e6
    # The whole and its half beside each other would be 1.5.
    assert found["peak"] < 1.4 * whole
    assert found["left"] < 0.8 * whole
    assert found["saving"] < found["left"] + 0.05 * whole
