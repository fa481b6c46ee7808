"""Learned gates: hard-concrete formulas, expected cost, gradients, and the way to the target."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import tiny
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hfslim import PruningCallback
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.structure import Entry, Structure
from hfslim.measuring.measurement import macs
from hfslim.pipeline.stages.prune import Prune
from hfslim.pruning import UnusableScoresError
from hfslim.pruning.gates.gates import Gates
from hfslim.pruning.in_training.expected_cost import ExpectedCost
from hfslim.pruning.in_training.learned_gates import LearnedGates, hard_concrete, presence
from hfslim.pruning.latency.latency_table import Curve, LatencyTable
from hfslim.pruning.search.unit_costs import count
from hfslim.pruning.target import Target

ALL = ("heads", "neurons", "layers")
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HALF = Target("macs", 0.5)


def _learned(model, kinds=ALL, target=HALF, steps=40):
    units = find_units(model).of(kinds)
    costs = count(model, units, "macs", example_inputs(model, length=12))
    gates = Gates(model, units)
    return LearnedGates(gates, ExpectedCost(units, target, costs), seed=0, steps=steps), costs


def _data(examples=64):
    texts = torch.randint(64, (examples, 12), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": texts.tolist(), "labels": (texts[:, 0] % 3).tolist()})


def _train(folder, callbacks, model=None, **arguments):
    set_seed(0)
    args = {"per_device_train_batch_size": 8, "max_steps": 60, "learning_rate": 1e-3}
    args |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    trainer = Trainer(
        model=tiny("bert") if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **args | arguments),
        train_dataset=_data(),
        eval_dataset=_data(16),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def test_a_gate_is_the_stretched_sigmoid_of_louizos_et_al():
    log_alpha, u = np.linspace(-6, 6, 25), np.linspace(0.01, 0.99, 25)
    s = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u) + log_alpha) / (2 / 3)))
    expected = np.minimum(1, np.maximum(0, s * (1.1 - -0.1) + -0.1))
    found = hard_concrete(torch.from_numpy(log_alpha), torch.from_numpy(u))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    assert 0 < (expected == 0).sum() < 25 and 0 < (expected == 1).sum() < 25


@pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.0, 2.0])
def test_presence_is_how_often_a_drawn_gate_is_not_zero(log_alpha):
    noise = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = hard_concrete(torch.tensor(log_alpha, dtype=torch.float64), noise)
    often = (drawn > 0).double().mean().item()
    assert presence(torch.tensor(log_alpha)).item() == pytest.approx(often, abs=0.004)


def _random_structure(units, generator):
    """Draw a structure with each unit there or not; and say where each is, as 0 and 1."""
    present, entries = {}, []
    for site in units:
        there = torch.rand(site.size, generator=generator) < 0.6
        if site.kind == "layers":
            there[0] = True
        present[site.kind, site.path] = there.double()
        entries.append(
            Entry(site.kind, site.path, tuple(there.nonzero().flatten().tolist()), site.size)
        )
    return present, Structure(tuple(entries))


@pytest.mark.parametrize("resource", ["macs", "parameters", "latency"])
def test_the_expected_cost_of_units_that_are_there_or_not_is_the_cost(resource):
    model = tiny("bert")
    units, inputs = find_units(model), example_inputs(model, length=12)
    if resource == "latency":
        layers = {f"bert.encoder.layer.{i}": 1.0 + i for i in range(3)}
        sites = {
            (s.kind, s.path): Curve((0, s.size // 2, s.size), (0.0, 1.5, 2.0))
            for s in units
            if s.kind != "layers"
        }
        costs = LatencyTable(20.0, layers, sites)
    else:
        costs = count(model, units, resource, inputs)
    expected = ExpectedCost(units, Target(resource, 0.5), costs)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        present, structure = _random_structure(units, generator)
        found = expected.kept(present).item()
        assert found == pytest.approx(costs.of(units, structure) / costs.total, rel=1e-9)


def test_the_expected_cost_is_the_mean_over_drawn_structures():
    model = tiny("bert")
    units = find_units(model)
    costs = count(model, units, "macs", example_inputs(model, length=12))
    generator = torch.Generator().manual_seed(0)
    drawn = [_random_structure(units, generator)[1] for _ in range(1000)]
    mean = np.mean([costs.of(units, structure) for structure in drawn]) / costs.total
    present = {(s.kind, s.path): torch.full((s.size,), 0.6).double() for s in units}
    present["layers", "bert.encoder.layer"][0] = 1.0
    found = ExpectedCost(units, Target("macs", 0.5), costs).kept(present).item()
    assert found == pytest.approx(mean, abs=0.01)


def test_a_sparsity_limits_each_kind_by_its_count():
    units = find_units(tiny("bert"))
    target = Target("sparsity", 1.0, {"heads": 0.25, "layers": 0.5})
    expected = ExpectedCost(units, target)
    present, structure = _random_structure(units, torch.Generator().manual_seed(1))
    layers = structure.kept("layers", "bert.encoder.layer")
    heads = sum(
        len(e.kept) for e in structure if e.kind == "heads" and int(e.path.split(".")[3]) in layers
    )
    assert expected.names == ("heads", "layers")
    assert expected.kept(present).tolist() == pytest.approx([heads / 12, len(layers) / 3])
    assert expected.limits(target).tolist() == [0.75, 0.5]
    assert expected.limits(target.at(0.5)).tolist() == [0.875, 0.75]


def test_the_gradient_of_drawn_gates_is_that_of_scaled_weights():
    """A head's or neuron's gate scales columns of a projection; a layer's what it adds."""
    model = tiny("bert", **CALM)
    batch = example_inputs(model, 5, length=8)
    labels = torch.arange(5) % 3
    learned, _ = _learned(model, ("heads", "neurons"))
    learned.draw(3)
    with learned.gates:
        loss = cross_entropy(model(**batch).logits, labels)
        loss.backward()
    found = {key: leaf.grad for key, leaf in learned.gates.factors.items()}

    gates = {
        key: leaf.detach().clone().requires_grad_() for key, leaf in learned.gates.factors.items()
    }
    scaled = {}
    for site in learned.gates.units:
        weight = model.get_submodule(site.gate).weight.detach()
        factor = gates[site.kind, site.path].repeat_interleave(site.width)
        scaled[f"{site.gate}.weight"] = weight * factor
    again = cross_entropy(functional_call(model, scaled, kwargs=batch).logits, labels)
    expected = torch.autograd.grad(again, list(gates.values()))
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    for key, gradient in zip(gates, expected, strict=True):
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-7)


def test_a_layers_gate_scales_what_the_layer_adds():
    model = tiny("bert", **CALM)
    batch = example_inputs(model, 3, length=8)
    learned, _ = _learned(model, ("layers",))
    scale = torch.tensor([0.3, 1.0, 0.0], requires_grad=True)
    learned.gates.factors = {("layers", "bert.encoder.layer"): scale}
    with learned.gates:
        found = model(**batch).logits
    states = model.bert.embeddings(batch["input_ids"])
    for layer, factor in zip(model.bert.encoder.layer[:2], (0.3, 1.0), strict=True):
        states = states + factor * (layer(states) - states)
    expected = model.classifier(model.bert.pooler(states))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gates_learn_the_same_under_activation_checkpointing(reentrant):
    model = tiny("bert", **CALM).train()
    batch, labels = example_inputs(model, 4, length=8), torch.arange(4) % 3

    def gradients():
        learned, _ = _learned(model)
        learned.draw(0)
        with learned.gates:
            cross_entropy(model(**batch).logits, labels).backward()
        return {key: leaf.grad for key, leaf in learned.gates.factors.items()}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for key, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[key], rtol=1e-5, atol=1e-8)
        assert gradient.abs().max() > 0


def test_log_alpha_follows_loss_and_penalty():
    """One step against the whole objective, differentiated in one piece by autograd."""
    model = tiny("bert", **CALM)
    learned, _ = _learned(model, ("heads", "neurons", "layers"))
    batch, labels = example_inputs(model, 4, length=12), torch.arange(4) % 3
    learned.draw(0)
    with learned.gates:
        for part in (slice(0, 2), slice(2, 4)):  # two batches to a step
            inputs = {name: value[part] for name, value in batch.items()}
            (cross_entropy(model(**inputs).logits, labels[part]) / 2).backward()
    learned.learn(Target("macs", 0.6))
    found = learned._log_alpha.grad

    noise = torch.from_numpy(np.random.default_rng([0, 0]).random(len(found))).float()
    log_alpha = torch.full_like(found, float(np.log(19)), requires_grad=True)
    sizes = [site.size for site in learned.gates.units]
    keys = [(site.kind, site.path) for site in learned.gates.units]
    learned.gates.factors = dict(
        zip(keys, hard_concrete(log_alpha, noise).split(sizes), strict=True)
    )
    with learned.gates:
        loss = cross_entropy(model(**batch).logits, labels)
    kept = learned.cost.kept(dict(zip(keys, presence(log_alpha).split(sizes), strict=True)))
    gap = kept.sum() - 0.6
    (loss + 100 * gap**2).backward()
    torch.testing.assert_close(found, log_alpha.grad, rtol=1e-4, atol=1e-6)


class _Expected(TrainerCallback):
    """Keeps what the gates are expected to cost at the last step before the decision."""

    def __init__(self, callback):
        self.callback, self.last = callback, None

    def on_step_end(self, *_, **__):
        if self.callback._learned is not None:
            self.last = self.callback._learned.expected()


@pytest.mark.parametrize(
    ("target", "units"),
    [
        ({"macs": 0.5}, ("heads", "neurons")),
        ({"macs": 0.4}, ALL),
        ({"parameters": 0.8}, ("neurons",)),
        ({"sparsity": {"heads": 0.5, "neurons": 0.25}}, ("heads", "neurons")),
    ],
)
def test_the_lagrangian_meets_the_target(tmp_path, target, units):
    model = tiny("bert")
    inputs = example_inputs(model, length=12)
    whole = macs(model, inputs)
    callback = PruningCallback(target, units, "l0", "linear", end=0.9, inputs=inputs)
    spy = _Expected(callback)
    _train(tmp_path, [callback, spy], model)
    counts = callback.structure.counts()
    if "sparsity" in target:
        assert spy.last == pytest.approx({"heads": 0.5, "neurons": 0.75}, abs=0.02)
        assert counts == {"heads": (6, 12), "neurons": (108, 144)}
    else:
        assert spy.last == pytest.approx(target, abs=0.02)
    if "macs" in target:
        assert target["macs"] - 0.05 < macs(model, inputs) / whole <= target["macs"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_units_that_the_loss_does_not_need_close():
    """A loss that falls with the gates of even neurons and does not see those of odd ones."""
    target = Target("sparsity", 1.0, {"neurons": 0.5})
    learned, _ = _learned(tiny("bert"), ("neurons",), target, steps=100)
    learned.cost = ExpectedCost(learned.gates.units, target)
    for step in range(100):
        learned.draw(step)
        for leaf in learned.gates.factors.values():
            leaf.grad = torch.zeros_like(leaf)
            leaf.grad[::2] = -0.01
        learned.learn(target.at(min(1.0, step / 70)))
    assert learned.expected()["neurons"] == pytest.approx(0.5, abs=0.01)
    for presences in learned.present().values():
        assert presences[::2].min() > 0.9
        assert presences[1::2].max() < 0.1


def test_evaluation_draws_nothing_and_the_logs_tell_the_expected_cost(tmp_path):
    callback = PruningCallback({"macs": 0.5}, criterion="l0", schedule="linear", end=0.8)
    settings = {"learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 5, "max_steps": 40}
    log = _train(tmp_path, [callback], **settings).state.log_history
    expected = [entry["expected_macs"] for entry in log if "expected_macs" in entry]
    assert len(expected) == 31
    assert expected[0] > 0.9 and expected[-1] < 0.6
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert losses[-2] == losses[-1]  # gates are final
    assert losses[0] != losses[-1]


def test_a_gradient_that_is_not_finite_names_the_module():
    model = tiny("bert", **CALM)
    learned, _ = _learned(model)
    learned.draw(0)
    key = ("neurons", "bert.encoder.layer.1")
    learned.gates.factors[key].grad = torch.full((48,), float("nan"))
    with pytest.raises(UnusableScoresError, match=r"neurons at 'bert.encoder.layer.1' are not"):
        learned.learn(HALF)


def test_stopping_early_prunes_by_what_has_been_learned(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    callback = PruningCallback({"sparsity": 0.5}, criterion="l0")
    _train(tmp_path, [callback, Stop()])
    assert callback.structure.counts() == {"heads": (6, 12), "neurons": (72, 144)}
    assert "before the target was due" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "oneshot"}, r"one of \['cubic', 'linear'\]"),
        ({"schedule": "iterative"}, r"one of \['cubic', 'linear'\]"),
        ({"interval": 5}, "no interval"),
        ({"criterion": {"heads": "l0", "neurons": "fisher"}}, "cannot be mixed"),
    ],
)
def test_what_learned_gates_cannot_do_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PruningCallback({"macs": 0.5}, **{"criterion": "l0"} | arguments)


def test_a_recipe_with_levels_for_learned_gates_is_refused():
    with pytest.raises(ValueError, match=r"one of \['cubic', 'linear'\]"):
        Prune({"macs": 0.5}, criterion="l0", schedule="iterative")
    assert Prune({"macs": 0.5}, criterion="l0", schedule="linear").trains
