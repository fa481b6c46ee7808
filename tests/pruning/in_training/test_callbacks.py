import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import zoo
from datasets import Dataset
from models import tiny
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hfslim import LayerDropCallback, PruningCallback
from hfslim.anatomy.inputs import example_inputs
from hfslim.measuring.measurement import macs
from hfslim.pruning import UnreachableTargetError, gated, shrink, spaced_layers


class _GradientSpy(TrainerCallback):
    def __init__(self):
        self.without = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.without += [name for name, p in model.named_parameters() if p.grad is None]


def _data(examples=64):
    texts = torch.randint(64, (examples, 12), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": texts.tolist(), "labels": (texts[:, 0] % 3).tolist()})


def _trainer(output, callback, model=None, **arguments):
    set_seed(0)
    args = TrainingArguments(
        output_dir=str(output),
        **{
            "per_device_train_batch_size": 8,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
        }
        | arguments,
    )
    model = tiny("bert") if model is None else model
    callbacks = [callback] if callback else []
    return Trainer(
        model=model, args=args, train_dataset=_data(), eval_dataset=_data(16), callbacks=callbacks
    )


def test_the_model_is_shrunk_to_the_target_when_training_ends(tmp_path):
    model = tiny("bert")
    inputs = example_inputs(model, length=12)
    whole = macs(model, inputs)
    callback = PruningCallback(target={"macs": 0.5}, inputs=inputs)
    trainer = _trainer(tmp_path, callback, model)
    trainer.train()
    assert 0.45 < macs(trainer.model, inputs) / whole <= 0.5
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_structure_only_ever_loses_units(tmp_path, monkeypatch):
    seen = []
    callback = PruningCallback(target={"sparsity": 0.5}, end=0.8)
    decide = callback._decide

    def spy(*args):
        decide(*args)
        seen.append(callback.structure)

    monkeypatch.setattr(callback, "_decide", spy)
    _trainer(tmp_path, callback).train()
    assert len(seen) > 5
    assert all(later.within(earlier) for earlier, later in pairwise(seen))
    assert callback.structure.counts() == {"heads": (6, 12), "neurons": (72, 144)}


def test_the_logs_tell_what_is_kept(tmp_path):
    trainer = _trainer(tmp_path, PruningCallback(target={"sparsity": 0.5}))
    trainer.train()
    kept = [log["kept_neurons"] for log in trainer.state.log_history if "kept_neurons" in log]
    assert 0.5 < kept[0] < 1
    assert kept[-1] == 0.5


@pytest.mark.parametrize("stop", [4, 7])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, stop):
    def callback():
        return PruningCallback(target={"macs": 0.6}, interval=3, end=0.75)

    whole = _trainer(tmp_path / "whole", callback())
    whole.train()
    cut = _trainer(tmp_path / "cut", callback(), save_strategy="steps", save_steps=stop)
    cut.train()
    again = callback()
    resumed = _trainer(tmp_path / "cut", again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    expected = whole.model.state_dict()
    found = resumed.model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


FAMILIES = [
    {"criterion": "taylor", "schedule": "linear"},
    {"criterion": "kl_fisher", "schedule": "oneshot"},
    {"criterion": "movement", "schedule": "iterative"},
    {"criterion": "activation", "schedule": "iterative"},
    {"criterion": "magnitude", "schedule": "cubic"},
    {"criterion": "block_influence", "schedule": "linear", "units": ["layers"]},
    {"criterion": "l0", "schedule": "linear"},
    {"criterion": "l0", "schedule": "cubic", "units": ["heads", "neurons", "layers"]},
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"{f['criterion']}-{f['schedule']}")
def test_each_criterion_and_schedule_resumes_exactly(tmp_path, family):
    def run(**arguments):
        callback = PruningCallback({"macs": 0.6}, end=0.75, **family)
        trainer = _trainer(tmp_path, callback, max_steps=12, logging_steps=6, **arguments)
        return trainer, callback

    whole, callback = run(save_strategy="steps", save_steps=5)
    whole.train()
    resumed, again = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert not callback.structure.is_full
    assert again.structure == callback.structure
    found = resumed.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, found[name])


@pytest.mark.parametrize(
    ("schedule", "kept"),
    [
        ("iterative", {4: 63, 8: 54, 12: 45, 16: 36}),
        ("oneshot", {16: 36}),
        ("linear", {step: 72 - round(step * 36 / 16) for step in range(1, 17)}),
    ],
)
def test_a_schedule_removes_at_its_levels_and_no_more(tmp_path, monkeypatch, schedule, kept):
    """Half of 72 neurons in 16 steps, from scores of all steps since the level before."""
    seen, examples = {}, []
    model = tiny("bert", num_hidden_layers=1, intermediate_size=72)
    callback = PruningCallback({"sparsity": 0.5}, ["neurons"], schedule=schedule, end=0.8)
    decide = callback._decide

    def spy(state, done, model):
        examples.append(callback._collector.scores.count)
        decide(state, done, model)
        [(seen[state.global_step], _)] = callback.structure.counts().values()

    monkeypatch.setattr(callback, "_decide", spy)
    _trainer(tmp_path, callback, model, max_steps=20).train()
    assert seen == kept
    assert examples == [8 * 16 // len(kept)] * len(kept)


class _Movement(TrainerCallback):
    """Sums −W · ∂L/∂W over the columns of each neuron, by the gradients that the Trainer has."""

    def __init__(self, module):
        self.module, self.total = module, 0.0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step >= 6:
            return
        weight = self.module.weight
        self.total = self.total - (weight.detach() * weight.grad).sum(0).double()


def test_movement_sums_weight_times_gradient_over_all_decisions(tmp_path):
    model = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    callback = PruningCallback({"sparsity": 0.25}, ["neurons"], "movement", "linear", interval=2)
    scores = {}
    decide = callback._decide

    def spy(*args):
        scores[args[0].global_step] = dict(callback._collector.scores.sums)
        decide(*args)

    callback._decide = spy
    trainer = _trainer(tmp_path, callback, model, max_steps=12, max_grad_norm=0.0)
    own = _Movement(model.bert.encoder.layer[1].output.dense)
    trainer.add_callback(own)
    trainer.train()
    found = scores[6]["neurons", "bert.encoder.layer.1"]
    torch.testing.assert_close(found, 8 * own.total, rtol=1e-4, atol=1e-6)
    assert sorted(scores) == [2, 4, 6] and found.abs().max() > 1e-2


def test_a_resume_with_other_settings_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4}
    _trainer(tmp_path, PruningCallback(target={"macs": 0.6}), **settings).train()
    other = _trainer(tmp_path, PruningCallback(target={"macs": 0.7}))
    with pytest.raises(
        ValueError, match=r"values of \['target'\]: pass the same PruningCallback, or start"
    ):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_the_best_model_has_the_final_structure(tmp_path):
    trainer = _trainer(
        tmp_path,
        PruningCallback(target={"macs": 0.5}, end=0.5),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert best > trainer.state.max_steps // 2


def test_an_unreachable_target_is_refused_before_training(tmp_path):
    model = tiny("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = _trainer(tmp_path, PruningCallback(target={"macs": 1e-5}), model)
    with pytest.raises(UnreachableTargetError, match="are left"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_latency_without_a_table_is_refused_before_training(tmp_path):
    model = zoo.tiny("image/resnet")
    callback = PruningCallback(target={"latency": 0.5}, units=["channels"])
    with pytest.raises(ValueError, match="no latency table for channels"):
        _trainer(tmp_path, callback, model).train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": {"macs": 1.5}}, r"\(0, 1\]"),
        ({"target": {"macs": 0.5}, "schedule": "quadratic"}, "schedule must be one of"),
        ({"target": {"macs": 0.5}, "start": 0.6, "end": 0.5}, "start < end"),
        ({"target": {"macs": 0.5}, "interval": 0}, "at least 1"),
        ({"target": {"macs": 0.5}, "units": ("head",)}, "unknown kind of unit 'head'"),
        ({"target": {"macs": 0.5}, "criterion": "luck"}, "expected one of"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PruningCallback(**arguments)


def test_layerdrop_skips_the_same_layers_in_every_run_and_none_in_evaluation(tmp_path):
    def run(name):
        skipped = []
        callback = LayerDropCallback(p=0.5, seed=3)
        begin = callback.on_step_begin

        def spy(args, state, control, **kwargs):
            begin(args, state, control, **kwargs)
            skipped.append(dict(callback._gates.closed))

        callback.on_step_begin = spy
        trainer = _trainer(tmp_path / name, callback)
        trainer.train()
        return skipped, trainer

    one, trainer = run("one")
    two, _ = run("two")
    assert one == two
    fraction = sum(len(layers) for step in one for layers in step.values()) / (3 * len(one))
    assert 0.25 < fraction < 0.75
    assert not any(layer._forward_hooks for layer in trainer.model.bert.encoder.layer)


def test_layerdrop_leaves_no_parameter_without_gradient(tmp_path):
    trainer = _trainer(tmp_path, LayerDropCallback(p=0.9), max_steps=4)
    spy = _GradientSpy()
    trainer.add_callback(spy)
    trainer.train()
    assert spy.without == []


def test_a_model_trained_with_layerdrop_runs_at_any_depth(tmp_path):
    trainer = _trainer(tmp_path, LayerDropCallback(p=0.5))
    trainer.train()
    model, losses = trainer.model, {}
    for keep in (3, 2, 1):
        with gated(model, spaced_layers(model, keep)):
            losses[keep] = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == losses[3]
    assert len(set(losses.values())) == 3
    shrink(model, spaced_layers(model, 2))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[2], abs=1e-6)


def test_a_kind_that_the_model_lacks_is_refused_before_training(tmp_path):
    model = tiny("bert", num_hidden_layers=1)
    trainer = _trainer(tmp_path, PruningCallback({"macs": 0.5}, ("heads", "layers")), model)
    with pytest.raises(ValueError, match=r"has no layers that can be removed \(.*; it has"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_evaluation_in_training_runs_every_layer(tmp_path):
    model = tiny("bert")
    trainer = _trainer(
        tmp_path,
        LayerDropCallback(p=0.9),
        model,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
        learning_rate=0.0,
    )
    expected = _trainer(tmp_path, None, model).evaluate()["eval_loss"]
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert losses == pytest.approx([expected, expected])


def test_a_plain_script_is_told_how_the_pruning_goes_and_so_is_the_card(tmp_path):
    script = """
import sys
from test_callbacks import PruningCallback, _trainer
callback = PruningCallback(target={"sparsity": 0.5}, schedule="iterative", end=0.8)
trainer = _trainer(sys.argv[1], callback, logging_steps=500)
trainer.train()
trainer.evaluate()
trainer.create_model_card()
assert {"hfslim", "pruned"} <= {*trainer.model.model_tags}
"""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "heads" in line]
    begun, *levels, ended = told
    assert "prunes heads and neurons to sparsity=0.5 from step" in begun and "12/12 heads" in begun
    assert len(levels) == 5 and all(": keeps " in line for line in levels)
    assert "shrunk, it keeps 6/12 heads, 72/144 neurons" in ended
    assert "- Units Kept Heads: 0.5" in (tmp_path / "README.md").read_text()
