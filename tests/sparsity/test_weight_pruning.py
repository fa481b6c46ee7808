"""Zeros hold in training whatever the optimizer does, and over save, reload and resume."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from models import tiny
from transformers import (
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hfslim import (
    DistillationConfig,
    DistillationTrainer,
    PruningCallback,
    SlimTrainer,
    WeightPruningCallback,
    weight_sparsity,
)
from hfslim.anatomy.weights import find_weights
from hfslim.pruning import UnusableScoresError

CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOTAL = 3 * (4 * 32 * 32 + 2 * 32 * 48) + 32 * 32


class _Stop(TrainerCallback):
    """Ends training after a step: in good order, or by an error."""

    def __init__(self, step, error=False):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.error:
                raise KeyboardInterrupt
            control.should_training_stop = True


class _Watch(TrainerCallback):
    """Notes the zeros after each step, and that none is lost."""

    def __init__(self):
        self.fractions, self.before = [], {}

    def on_step_end(self, args, state, control, model, **kwargs):
        zeros = {path: module.weight == 0 for path, module in find_weights(model).items()}
        for path, zero in self.before.items():
            assert zero[self.before[path]].all()
        self.before = zeros
        self.fractions.append(sum(int(z.sum()) for z in zeros.values()) / TOTAL)


def _data(examples=64):
    texts = torch.randint(64, (examples, 12), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": texts.tolist(), "labels": (texts[:, 0] % 3).tolist()})


def _settings(folder, **arguments):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 8,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    } | arguments


def _trainer(folder, callbacks, model=None, cls=SlimTrainer, **arguments):
    set_seed(0)
    return cls(
        model=tiny("bert", **CALM) if model is None else model,
        args=TrainingArguments(**_settings(folder, **arguments)),
        train_dataset=_data(),
        eval_dataset=_data(16),
        callbacks=callbacks,
    )


def _all(model):
    return weight_sparsity(model)[-1]


def _hooks(model):
    return sum(len(p._backward_hooks or {}) for p in model.parameters())


def _equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


WAYS = {
    "adamw": {"weight_decay": 0.1},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1},
    "adafactor": {"optim": "adafactor"},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "clipping": {"max_grad_norm": 0.01},
    "bf16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True},
    "reentrant": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
}


CASES = [({"pattern": "2:4"}, way) for way in WAYS]
CASES += [({"sparsity": 0.6}, way) for way in ("adamw", "momentum")]


@pytest.mark.parametrize(("goal", "way"), CASES)
def test_no_step_loses_a_zero_and_the_goal_is_met_exactly(tmp_path, goal, way):
    keys = list(tiny("bert").state_dict())
    watch = _Watch()
    trainer = _trainer(tmp_path, [WeightPruningCallback(**goal), watch], **WAYS[way])
    trainer.train()
    expected = round(goal.get("sparsity", 0.5) * TOTAL) / TOTAL
    assert watch.fractions[3:] == [pytest.approx(expected, abs=1e-9)] * 5
    assert 0 < watch.fractions[0] < watch.fractions[1] < watch.fractions[2] < expected
    assert list(trainer.model.state_dict()) == keys
    assert not _hooks(trainer.model)
    trainer.save_model(str(tmp_path / "final"))
    reloaded = BertForSequenceClassification.from_pretrained(tmp_path / "final")
    _equal(reloaded.state_dict(), trainer.model.state_dict())
    assert _all(reloaded).sparsity == pytest.approx(expected, abs=1e-9)
    assert _all(reloaded).pattern == goal.get("pattern", "")


@pytest.mark.parametrize("method", ["magnitude", "movement"])
@pytest.mark.parametrize("cls", [SlimTrainer, Trainer])
def test_resume_is_exact(tmp_path, method, cls):
    def run(folder, **arguments):
        callback = WeightPruningCallback(sparsity=0.6, method=method, end=0.75)
        return _trainer(folder, [callback], tiny("bert"), cls, **arguments)

    whole = run(tmp_path, save_strategy="steps", save_steps=3)
    whole.train()
    for step, arguments in ((3, {}), (6, {"restore_callback_states_from_checkpoint": True})):
        resumed = run(tmp_path / "again", **arguments)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        _equal(resumed.model.state_dict(), whole.model.state_dict())


def test_a_live_weight_that_is_zero_by_chance_lives_on_after_a_resume(tmp_path):
    class Nudge(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 6:
                weight = model.bert.pooler.dense.weight
                weight.data.view(-1)[int(weight.abs().argmax())] = 0

    def run(folder, **arguments):
        callback = WeightPruningCallback(sparsity=0.3)
        return _trainer(folder, [callback, Nudge()], **arguments)

    whole = run(tmp_path, save_strategy="steps", save_steps=6)
    whole.train()
    resumed = run(tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    _equal(resumed.model.state_dict(), whole.model.state_dict())
    assert int((whole.model.bert.pooler.dense.weight == 0).sum()) == int(
        next(c for c in whole.callback_handler.callbacks if isinstance(c, WeightPruningCallback))
        .zeros["bert.pooler.dense"]
        .sum()
    )


def test_hooks_that_an_interrupted_run_left_do_not_outlive_the_next(tmp_path):
    model = tiny("bert", **CALM)
    with pytest.raises(KeyboardInterrupt):
        _trainer(tmp_path, [WeightPruningCallback(0.5), _Stop(5, error=True)], model).train()
    assert _hooks(model)
    _trainer(tmp_path, [WeightPruningCallback(0.6)], model).train()
    assert not _hooks(model)
    assert _all(model).sparsity == pytest.approx(0.6, abs=1e-4)


def test_resume_is_exact_in_a_process_where_the_interrupted_run_left_its_hooks(tmp_path):
    def run(callbacks, model):
        callbacks = [WeightPruningCallback(0.6, method="movement", end=0.75), *callbacks]
        return _trainer(tmp_path, callbacks, model, save_strategy="steps", save_steps=3)

    whole = run([], tiny("bert"))
    whole.train()
    model = tiny("bert")
    with pytest.raises(KeyboardInterrupt):
        run([_Stop(5, error=True)], model).train()
    resumed = run([], model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    _equal(resumed.model.state_dict(), whole.model.state_dict())
    assert not _hooks(model)


def test_movement_sums_weight_times_gradient(tmp_path):
    class Spy(TrainerCallback):
        def __init__(self):
            self.score = torch.zeros(32, 32)

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            weight = model.bert.pooler.dense.weight
            self.score -= weight.detach() * weight.grad

    spy = Spy()
    callback = WeightPruningCallback(0.5, method="movement", schedule="oneshot", end=1.0)
    _trainer(tmp_path, [callback, spy], max_steps=4, optim="sgd").train()
    torch.testing.assert_close(callback._movement["bert.pooler.dense"], spy.score)
    scores = torch.cat([score.flatten() for score in callback._movement.values()])
    zeros = torch.cat([zero.flatten() for zero in callback.zeros.values()])
    assert scores[zeros].max() <= scores[~zeros].min()


def test_held_weights_have_no_gradient_and_no_state(tmp_path):
    class Spy(TrainerCallback):
        norms = ()

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            live = [p.grad[p != 0] if p.ndim == 2 else p.grad.flatten() for p in model.parameters()]
            self.norms = (*self.norms, torch.cat(live).norm().item())

    callback, spy = WeightPruningCallback(0.9, end=0.25), Spy()
    trainer = _trainer(tmp_path, [callback, spy], logging_steps=1, max_grad_norm=1e6)
    trainer.train()
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    assert norms[4:] == pytest.approx(spy.norms[4:], rel=1e-5)
    for path, zeros in callback.zeros.items():
        weight = trainer.model.get_submodule(path).weight
        state = trainer.optimizer.state[weight]
        assert not state["exp_avg"][zeros].any()
        assert not state["exp_avg_sq"][zeros].any()
        assert state["exp_avg_sq"][~zeros].any()


@pytest.mark.parametrize("goal", [{"sparsity": 0.7}, {"pattern": "1:4"}])
def test_a_later_training_holds_the_zeros_of_an_earlier_one(tmp_path, goal):
    first = _trainer(tmp_path, [WeightPruningCallback(**goal)])
    first.train()
    first.save_model(str(tmp_path / "sparse"))
    model = BertForSequenceClassification.from_pretrained(tmp_path / "sparse")
    before = copy.deepcopy(model)
    callback = WeightPruningCallback()
    second = _trainer(tmp_path / "again", [callback], model, weight_decay=0.1)
    second.train()
    assert _all(second.model) == _all(before)
    for path, module in find_weights(second.model).items():
        old = before.get_submodule(path).weight
        assert torch.equal(module.weight == 0, old == 0)
        assert not torch.equal(module.weight, old)


def test_more_weights_go_from_a_model_that_has_zeros(tmp_path):
    model = tiny("bert", **CALM)
    _trainer(tmp_path, [WeightPruningCallback(0.4)], model).train()
    watch = _Watch()
    _trainer(tmp_path, [WeightPruningCallback(0.8, method="movement"), watch], model).train()
    assert watch.fractions[0] > 0.4
    assert _all(model).sparsity == pytest.approx(0.8, abs=1e-4)
    with pytest.raises(ValueError, match=r"80\.00% of the weights are zero already, more than"):
        _trainer(tmp_path, [WeightPruningCallback(0.5)], model).train()


def test_there_must_be_zeros_to_hold(tmp_path):
    with pytest.raises(ValueError, match="BertForSequenceClassification has none"):
        _trainer(tmp_path, [WeightPruningCallback()]).train()


def test_distillation_prunes_weights_too(tmp_path):
    config = DistillationConfig(**_settings(tmp_path), allow_untrained_teacher=True)
    trainer = DistillationTrainer(
        model=tiny("bert"),
        args=config,
        teacher=tiny("bert", seed=1),
        train_dataset=_data(),
        callbacks=[WeightPruningCallback(pattern="2:4")],
    )
    trainer.train()
    assert _all(trainer.model).pattern == "2:4"
    assert all(row.pattern == "" for row in weight_sparsity(trainer.teacher))


@pytest.mark.parametrize("family", ["vit", "wav2vec2", "whisper", "llama"])
def test_other_families_keep_their_pattern_over_a_reload(tmp_path, family):
    from hfslim.anatomy.inputs import example_inputs

    model = tiny(family)
    inputs = example_inputs(model, batch_size=16, length=1600 if family == "wav2vec2" else 12)
    data = [
        {name: value[i] for name, value in inputs.items()} | {"labels": i % 3} for i in range(16)
    ]
    trainer = SlimTrainer(
        model=model,
        args=TrainingArguments(**_settings(tmp_path, max_steps=3)),
        train_dataset=data,
        callbacks=[WeightPruningCallback(pattern="2:4", end=0.34)],
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    reloaded = type(model).from_pretrained(tmp_path / "final")
    # The first convolution of wav2vec2 has one input.
    incomplete = " but for incomplete groups" if family == "wav2vec2" else ""
    assert _all(reloaded).pattern == f"2:4{incomplete}"
    _equal(reloaded.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "callback",
    [
        lambda: WeightPruningCallback(sparsity=0.6),
        lambda: WeightPruningCallback(sparsity=0.6, scope="layer", method="movement"),
        lambda: WeightPruningCallback(sparsity=0.6, start=0.5, end=0.75),
        lambda: WeightPruningCallback(sparsity=0.6, end=1.0),
    ],
)
@pytest.mark.parametrize("units", [["heads", "neurons"], ["layers"]])
def test_weights_and_structure_go_in_one_training(tmp_path, callback, units):
    structure = PruningCallback({"sparsity": 0.4}, units=units, interval=1, end=0.5)
    weights = callback()
    trainer = _trainer(tmp_path, [structure, weights])
    trainer.train()
    assert not structure.structure.is_full
    row = _all(trainer.model)
    assert row.weights < TOTAL
    # Layers and rounding: each of at most 19 modules is off by half a weight at most.
    assert row.sparsity == pytest.approx(0.6, abs=10 / row.weights)
    trainer.save_model(str(tmp_path / "final"))
    reloaded = BertForSequenceClassification.from_pretrained(tmp_path / "final")
    assert _all(reloaded) == row


def test_a_pattern_holds_for_what_the_structure_leaves(tmp_path):
    structure = PruningCallback({"sparsity": 0.4}, interval=1, end=0.5)
    weights = WeightPruningCallback(pattern="2:4", start=0.5, end=0.75)
    trainer = _trainer(tmp_path, [structure, weights])
    trainer.train()
    sizes = {trainer.model.bert.encoder.layer[i].output.dense.in_features for i in range(3)}
    assert any(size % 4 for size in sizes)
    assert _all(trainer.model).pattern == "2:4 but for incomplete groups"
    assert _all(trainer.model).sparsity == pytest.approx(0.5, abs=0.02)


def test_stopping_before_the_structure_is_decided_meets_both_goals(tmp_path):
    structure = PruningCallback({"sparsity": 0.4}, interval=1, end=0.75)
    trainer = _trainer(tmp_path, [structure, WeightPruningCallback(0.6), _Stop(2)])
    trainer.train()
    assert _all(trainer.model).weights < TOTAL
    assert _all(trainer.model).sparsity == pytest.approx(0.6, abs=1e-3)


def test_held_zeros_outlive_a_structure_that_is_cut_in_training(tmp_path):
    model = tiny("bert", **CALM)
    _trainer(tmp_path, [WeightPruningCallback(0.5)], model).train()
    old = copy.deepcopy(model)
    structure = PruningCallback({"sparsity": 0.4}, interval=1)
    _trainer(tmp_path, [structure, WeightPruningCallback()], model).train()
    kept = structure.structure.kept("neurons", "bert.encoder.layer.1")
    for part, dim in (("intermediate", 0), ("output", 1)):
        path = f"bert.encoder.layer.1.{part}.dense.weight"
        expected = old.get_parameter(path).index_select(dim, torch.tensor(kept)) == 0
        assert torch.equal(model.get_parameter(path) == 0, expected)


def test_a_model_cut_before_is_pruned_and_one_pruned_before_is_cut(tmp_path):
    cut_first = _trainer(tmp_path, [PruningCallback({"sparsity": 0.4})])
    cut_first.train()
    _trainer(tmp_path, [WeightPruningCallback(0.6)], cut_first.model).train()
    assert _all(cut_first.model).weights < TOTAL
    assert _all(cut_first.model).sparsity == pytest.approx(0.6, abs=1e-3)
    cut_first.model.save_pretrained(tmp_path / "cut")
    reloaded = BertForSequenceClassification.from_pretrained(tmp_path / "cut")
    assert _all(reloaded) == _all(cut_first.model)


@pytest.mark.parametrize("structure_first", [True, False])
def test_the_order_of_the_two_callbacks_is_checked(tmp_path, structure_first):
    callbacks = [PruningCallback({"sparsity": 0.4}), WeightPruningCallback(0.5)]
    trainer = _trainer(tmp_path, callbacks if structure_first else callbacks[::-1])
    if structure_first:
        trainer.train()
    else:
        with pytest.raises(ValueError, match="put WeightPruningCallback after PruningCallback"):
            trainer.train()
        assert trainer.state.global_step == 0


def test_resume_is_exact_with_structure_too(tmp_path):
    def run(folder, **arguments):
        structure = PruningCallback({"sparsity": 0.4}, interval=1, end=0.6)
        return _trainer(folder, [structure, WeightPruningCallback(0.6)], **arguments)

    whole = run(tmp_path, save_strategy="steps", save_steps=3)
    whole.train()
    for step in (3, 6):
        resumed = run(tmp_path / "again")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        _equal(resumed.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("method", ["magnitude", "movement"])
def test_stopping_early_still_meets_the_goal(tmp_path, method):
    callback = WeightPruningCallback(pattern="2:4", method=method, end=0.9)
    trainer = _trainer(tmp_path, [callback, _Stop(2)])
    trainer.train()
    assert _all(trainer.model).pattern == "2:4"


def test_the_best_model_has_all_zeros(tmp_path):
    trainer = _trainer(
        tmp_path,
        [WeightPruningCallback(0.6, interval=1)],
        save_strategy="steps",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        max_steps=8,
    )
    trainer.train()
    best = int(Path(trainer.state.best_model_checkpoint).name.rpartition("-")[2])
    assert best >= 4
    assert _all(trainer.model).sparsity == pytest.approx(0.6, abs=1e-4)


def test_the_logs_tell_the_sparsity(tmp_path):
    trainer = _trainer(tmp_path, [WeightPruningCallback(0.6)], logging_steps=1)
    trainer.train()
    logged = [log["weight_sparsity"] for log in trainer.state.log_history if "loss" in log]
    assert logged[3:] == [pytest.approx(0.6, abs=1e-4)] * 5
    assert logged[0] < logged[1] < logged[2] < 0.6


def test_named_modules_alone_are_pruned(tmp_path):
    callback = WeightPruningCallback(pattern="2:4", target_modules=["query", "classifier"])
    model = _trainer(tmp_path, [callback]).model
    before = model.bert.pooler.dense.weight.clone()
    _trainer(tmp_path, [callback], model).train()
    rows = weight_sparsity(model, ["query", "classifier"])
    assert rows[-1].pattern == "2:4"
    assert not (model.bert.pooler.dense.weight == 0).any()
    assert not torch.equal(model.bert.pooler.dense.weight, before)


def test_resuming_without_or_with_another_callback_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    _trainer(tmp_path, [WeightPruningCallback(0.6)], **saving).train()
    checkpoint = str(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="weights removed so far would come back"):
        _trainer(tmp_path, []).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"other values of \['sparsity'\]"):
        _trainer(tmp_path, [WeightPruningCallback(0.7)]).train(resume_from_checkpoint=checkpoint)
    _trainer(tmp_path / "plain", [], **saving).train()
    checkpoint = str(tmp_path / "plain" / "checkpoint-4")
    with pytest.raises(ValueError, match="saved without a WeightPruningCallback"):
        _trainer(tmp_path, [WeightPruningCallback(0.6)]).train(resume_from_checkpoint=checkpoint)


def test_weights_that_the_stock_trainer_failed_to_load_are_noticed(tmp_path):
    callback = WeightPruningCallback(0.6)
    trainer = _trainer(tmp_path, [callback], save_strategy="steps", save_steps=4)
    trainer.train()
    model = tiny("bert")
    state = copy.copy(trainer.state)
    state.stateful_callbacks = {"WeightPruningCallback": callback.state()}
    with pytest.raises(ValueError, match="does not have the zeros of the checkpoint"):
        WeightPruningCallback(0.6).on_train_begin(trainer.args, state, None, model=model)


def test_movement_scores_that_were_not_saved_are_missed(tmp_path):
    def run(**arguments):
        callback = WeightPruningCallback(0.6, method="movement")
        return _trainer(tmp_path, [callback], **arguments)

    run(save_strategy="steps", save_steps=4, save_only_model=True).train()
    with pytest.raises(ValueError, match="save_only_model=False"):
        run().train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize(
    ("method", "arguments", "state", "message"),
    [
        ("magnitude", {"fsdp": True}, {}, "what FSDP splits between them: use DDP, or"),
        *(
            ("magnitude", {"deepspeed_plugin": SimpleNamespace(zero_stage=stage)}, {}, told)
            for stage, told in ((3, "ZeRO-3 .* DDP, or"), (1, "ZeRO-2 .* DDP, or"))
        ),
        ("movement", {"fp16": True}, {}, "bf16=True"),
        ("movement", {}, {"_mixed_precision": "fp16"}, "bf16=True"),
    ],
)
def test_training_that_would_lose_zeros_or_falsify_scores_is_refused(
    tmp_path, monkeypatch, method, arguments, state, message
):
    model = _trainer(tmp_path, []).model
    for name, value in state.items():
        monkeypatch.setitem(AcceleratorState._shared_state, name, value)
    usual = {"fp16": False, "fsdp": False, "deepspeed_plugin": None, "world_size": 1}
    args = SimpleNamespace(**usual | arguments)
    callback = WeightPruningCallback(0.5, method=method)
    with pytest.raises(ValueError, match=message):
        callback.on_train_begin(args, SimpleNamespace(global_step=0), None, model=model)
    assert not _hooks(model)


def test_movement_of_frozen_weights_is_refused(tmp_path):
    model = tiny("bert")
    model.bert.encoder.layer[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"6 weights are frozen, such as .bert\.encoder\.layer\.0"):
        _trainer(tmp_path, [WeightPruningCallback(0.5, method="movement")], model).train()
    _trainer(tmp_path, [WeightPruningCallback(0.5)], model).train()
    assert _all(model).sparsity == pytest.approx(0.5, abs=1e-4)


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = tiny("bert")
    model.bert.pooler.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(UnusableScoresError, match=r"the weight of .bert\.pooler\.dense. is not"):
        _trainer(tmp_path, [WeightPruningCallback(0.5)], model).train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.5, "pattern": "2:4"}, "give either sparsity"),
        ({"sparsity": 1.5}, "in \\(0, 1\\)"),
        ({"sparsity": 0.5, "method": "wanda"}, "method must be one of"),
        ({"sparsity": 0.5, "scope": "row"}, "scope must be one of"),
        ({"sparsity": 0.5, "schedule": "square"}, "schedule must be one of"),
        ({"sparsity": 0.5, "start": 0.6}, "0 <= start < end <= 1"),
        ({"sparsity": 0.5, "interval": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightPruningCallback(**arguments)
