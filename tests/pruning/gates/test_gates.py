"""Gradients by the gates are checked against gate tensors that are put in by hand."""

import pytest
import torch
from models import tiny
from structures import uneven
from torch.nn.functional import cross_entropy

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.structure import Structure
from hfslim.pruning.gates.gates import Gates, gated

LABELS = torch.tensor([0, 2, 1])
FAMILIES = ("bert", "llama", "swin", "wavlm", "modernbert", "wav2vec2", "whisper", "mpnet")


def _inputs(model, batch_size=3):
    length = 1200 if model.main_input_name == "input_values" else 12
    return example_inputs(model, batch_size, seed=3, length=length)


def _reported(model, inputs):
    """What the gates report in one backward pass of the batch, `[examples, units]` by site."""
    seen = {}

    def note(site, index, gradient):
        seen.setdefault((site.kind, site.path), {})[index] = gradient

    with Gates(model) as gates:
        gates.on_gradient = note
        cross_entropy(model(**inputs).logits, LABELS, reduction="sum").backward()
    return {
        key: torch.cat([by_index[i] for i in sorted(by_index)], dim=1)
        for key, by_index in seen.items()
    }


def _explicit(model, inputs):
    """The same by gate tensors of ones, one example at a time."""
    units = find_units(model)
    gates = {(s.kind, s.path): torch.ones(s.size, requires_grad=True) for s in units}

    def narrow(site, width):
        def hook(module, args):
            gate = gates[site.kind, site.path].repeat_interleave(width)
            if isinstance(module, torch.nn.Conv1d):
                gate = gate[:, None]
            return (args[0] * gate, *args[1:])

        return hook

    def layer(site, index):
        def hook(_, args, kwargs, output):
            before = args[0] if args else kwargs["hidden_states"]
            after = output if isinstance(output, torch.Tensor) else output[0]
            after = before + gates[site.kind, site.path][index] * (after - before)
            return after if isinstance(output, torch.Tensor) else (after, *output[1:])

        return hook

    handles = []
    for site in units:
        if site.kind == "layers":
            for i, module in enumerate(model.get_submodule(site.path)):
                handles.append(module.register_forward_hook(layer(site, i), with_kwargs=True))
        for feed in site.feeds:
            module = model.get_submodule(feed.module)
            handles.append(module.register_forward_pre_hook(narrow(site, feed.width)))
    rows = []
    for example, label in enumerate(LABELS):
        one = {name: value[example : example + 1] for name, value in inputs.items()}
        loss = cross_entropy(model(**one).logits, label[None])
        rows.append(torch.autograd.grad(loss, list(gates.values())))
    for handle in handles:
        handle.remove()
    return {key: torch.stack([row[i] for row in rows]) for i, key in enumerate(gates)}


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=str(key))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_every_example_is_that_of_a_gate_tensor(family):
    attention = "eager" if family in ("wavlm", "mpnet") else "sdpa"
    model = tiny(family, attention)
    inputs = _inputs(model)
    with Gates(model):  # WavLM's projections run as modules under its stand-in only.
        expected = _explicit(model, inputs)
    found = _reported(model, inputs)
    _assert_same(found, expected)
    assert any((value.abs() > 1e-3).any() for value in found.values())


def test_gradients_survive_gradient_checkpointing():
    model = tiny("bert")
    inputs = _inputs(model)
    expected = _reported(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    _assert_same(_reported(model, inputs), expected)


def test_gradients_do_not_need_trainable_parameters():
    model = tiny("bert")
    inputs = _inputs(model)
    expected = _reported(model, inputs)
    model.requires_grad_(False)
    _assert_same(_reported(model, inputs), expected)


def test_gradient_is_that_of_the_output_projection_times_its_weights():
    model = tiny("bert")
    found = _reported(model, _inputs(model))
    for site in find_units(model):
        if site.kind != "layers":
            weight = model.get_submodule(site.gate).weight
            product = (weight * weight.grad).reshape(-1, site.size, site.width).sum((0, 2))
            torch.testing.assert_close(
                found[site.kind, site.path].sum(0), product, rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("family", ["bert", "wavlm", "mpnet"])
def test_gates_leave_no_trace(family):
    model = tiny(family)
    keys = list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    with gated(model, uneven(model)):
        assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_gates_go_when_the_block_fails():
    model = tiny("bert")
    with pytest.raises(ZeroDivisionError), gated(model, uneven(model)):
        raise ZeroDivisionError
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_gates_attach_once():
    gates = Gates(tiny("bert")).attach()
    with pytest.raises(RuntimeError, match="attached already"):
        gates.attach()


@torch.no_grad()
def test_set_replaces_what_was_closed_before():
    model = tiny("bert")
    inputs = _inputs(model)
    whole = model(**inputs).logits
    with gated(model, uneven(model)) as gates:
        assert not torch.equal(model(**inputs).logits, whole)
        gates.set(gates.units.full())
        assert torch.equal(model(**inputs).logits, whole)


@torch.no_grad()
def test_a_closed_layer_passes_its_input_on():
    model = tiny("bert")
    inputs = _inputs(model)
    structure = Structure.of({"layers": {"bert.encoder.layer": ([0, 2], 3)}})
    with gated(model, structure):
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(states[1], states[2])


def test_parameters_of_a_closed_layer_stay_in_the_graph():
    model = tiny("bert")
    with gated(model, Structure.of({"layers": {"bert.encoder.layer": ([0, 2], 3)}})):
        model(**_inputs(model)).logits.sum().backward()
    for parameter in model.bert.encoder.layer[1].parameters():
        assert torch.count_nonzero(parameter.grad) == 0


@torch.no_grad()
def test_activations_are_what_the_projection_multiplies():
    model = tiny("bert")
    seen, fed = {}, []
    path = "bert.encoder.layer.1"
    model.get_submodule(f"{path}.output.dense").register_forward_pre_hook(
        lambda _, args: fed.append(args[0])
    )
    with Gates(model) as gates:
        gates.on_activation = lambda site, index, before, after: seen.update(
            {(site.kind, site.path, index): after}
        )
        model(**_inputs(model))
    assert torch.equal(seen["neurons", path, 0], fed[0])


@torch.no_grad()
def test_a_gate_that_is_never_reached_is_reported():
    model = tiny("bert")
    with Gates(model) as gates:
        model(**_inputs(model))
        gates.check_fired()
    model.bert.encoder.layer[1].attention.forward = lambda hidden, *_, **__: (hidden, None)
    with Gates(model) as gates:
        model(**_inputs(model))
        with pytest.raises(RuntimeError, match=r"encoder\.layer\.1\.attention\.self"):
            gates.check_fired()


def test_a_module_that_runs_more_than_once_is_reported():
    model = tiny("bert")
    layers = model.bert.encoder.layer
    layers[2] = layers[1]
    units = find_units(model).of(["neurons"])
    with Gates(model, units) as gates:
        model(**_inputs(model))
        with pytest.raises(RuntimeError, match=r"layer\.1' 2 times in one forward pass"):
            gates.check_fired()
