"""What may happen around a training that prunes: mishaps, and the options of a Trainer."""

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
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hfslim import (
    DistillationConfig,
    DistillationTrainer,
    LayerDropCallback,
    PruningCallback,
    SlimTrainer,
)

CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class _Stop(TrainerCallback):
    """Ends training after a step: in good order, or by an error."""

    def __init__(self, step, error=False):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.error:
                raise KeyboardInterrupt
            control.should_training_stop = True


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


def _trainer(folder, callbacks, model=None, **arguments):
    set_seed(0)
    return SlimTrainer(
        model=tiny("bert", **CALM) if model is None else model,
        args=TrainingArguments(**_settings(folder, **arguments)),
        train_dataset=_data(),
        eval_dataset=_data(16),
        callbacks=callbacks,
    )


def _structure(folder, model=None, **arguments):
    callback = PruningCallback(target={"sparsity": 0.5}, interval=2)
    trainer = _trainer(folder, [callback], model, **arguments)
    trainer.train()
    return callback.structure, trainer.model


def _hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("make", [lambda: PruningCallback({"macs": 0.6}), LayerDropCallback])
def test_gates_that_an_interrupted_run_left_do_not_outlive_the_next(tmp_path, make):
    model = tiny("bert", **CALM)
    with pytest.raises(KeyboardInterrupt):
        _trainer(tmp_path, [make(), _Stop(3, error=True)], model).train()
    assert _hooks(model)
    _trainer(tmp_path, [make()], model).train()
    assert not _hooks(model)


def test_stopping_right_after_a_decision_still_meets_the_target(tmp_path):
    callback = PruningCallback(target={"sparsity": 0.5}, interval=2)
    _trainer(tmp_path, [callback, _Stop(2)]).train()
    assert callback.structure.counts() == {"heads": (6, 12), "neurons": (72, 144)}


def test_stopping_before_the_first_score_leaves_the_model_whole(tmp_path, caplog):
    callback = PruningCallback(target={"sparsity": 0.5}, start=0.5, end=0.9)
    trainer = _trainer(tmp_path, [callback, _Stop(2)])
    trainer.train()
    assert callback.structure.is_full
    assert trainer.evaluate()["eval_loss"] > 0
    assert "the model is not pruned" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "state", "message"),
    [
        ({"fp16": True}, {}, "bf16=True"),
        ({}, {"_mixed_precision": "fp16"}, "bf16=True"),
        ({"fsdp": True}, {}, "what FSDP splits between them: use DDP or ZeRO-2, or"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, {}, "what ZeRO-3 .* DDP or ZeRO-2"),
        ({"n_gpu": 2}, {}, "one process per GPU"),
    ],
)
def test_training_that_would_falsify_the_scores_is_refused(
    tmp_path, monkeypatch, arguments, state, message
):
    model = _trainer(tmp_path, []).model
    for name, value in state.items():
        monkeypatch.setitem(AcceleratorState._shared_state, name, value)
    usual = {"fp16": False, "fsdp": False, "deepspeed_plugin": None}
    usual |= {"torch_compile": False, "n_gpu": 1}
    args, trainer_state = SimpleNamespace(**usual | arguments), SimpleNamespace()
    with pytest.raises(ValueError, match=message):
        PruningCallback({"macs": 0.6}).on_train_begin(args, trainer_state, None, model=model)
    assert not _hooks(model)


def test_units_that_never_run_are_refused_before_training(tmp_path):
    class WithUnused(BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.unused = copy.deepcopy(self.bert.encoder.layer[0])

    model = WithUnused(tiny("bert").config)
    trainer = _trainer(tmp_path, [PruningCallback({"sparsity": 0.5})], model)
    with pytest.raises(RuntimeError, match=r"does not run \['unused"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not _hooks(model)


def test_a_model_without_layers_cannot_drop_any(tmp_path):
    model = tiny("bert", num_hidden_layers=1)
    trainer = _trainer(tmp_path, [LayerDropCallback()], model)
    with pytest.raises(ValueError, match=r"has no layers that can be removed \(.*; it has"):
        trainer.train()


def test_a_layer_that_has_to_stay_is_never_dropped():
    model = tiny("deberta-v2")
    callback = LayerDropCallback(p=0.99)
    callback.on_train_begin(SimpleNamespace(torch_compile=False), None, model=model)
    callback.on_step_begin(None, SimpleNamespace(global_step=0))
    assert callback._gates.closed == {("layers", "deberta.encoder.layer"): {1, 2}}


def test_resuming_without_the_callback_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    _trainer(tmp_path, [PruningCallback({"macs": 0.6})], **saving).train()
    trainer = _trainer(tmp_path, [])
    with pytest.raises(ValueError, match="units removed so far would come back"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_the_trainers_own_way_of_restoring_callbacks_resumes_too(tmp_path):
    def run(folder, **arguments):
        callback = PruningCallback({"sparsity": 0.5}, interval=2)
        return _trainer(folder, [callback], **arguments)

    whole = run(tmp_path, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = run(tmp_path, restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    found = resumed.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, found[name])


@pytest.mark.parametrize(
    "arguments",
    [
        {"activation_checkpointing": True},
        {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": True},
        },
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"eval_strategy": "steps", "eval_steps": 1},
    ],
)
def test_how_a_step_is_computed_does_not_change_the_structure(tmp_path, arguments):
    # Adam divides a gradient by its own size: below epsilon, rounding alone would set the sign.
    calm = {"adam_epsilon": 1e-3}
    expected, model = _structure(tmp_path / "plain", **calm)
    found, other = _structure(tmp_path / "other", **calm, **arguments)
    assert found == expected
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_units_of_frozen_layers_are_scored(tmp_path):
    model = tiny("bert", **CALM)
    model.bert.requires_grad_(False)
    structure, model = _structure(tmp_path, model)
    assert structure.counts()["neurons"] == (72, 144)
    assert not any(p.requires_grad for p in model.bert.parameters())


def test_the_best_pruned_student_is_what_distillation_ends_with(tmp_path):
    callback = PruningCallback({"macs": 0.6}, end=0.5)
    config = DistillationConfig(
        **_settings(tmp_path, save_strategy="steps", eval_strategy="steps", max_steps=12),
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        allow_untrained_teacher=True,
    )
    trainer = DistillationTrainer(
        model=tiny("bert"),
        args=config,
        teacher=tiny("bert", seed=1),
        train_dataset=_data(),
        eval_dataset=_data(16),
        callbacks=[callback],
    )
    trainer.train()
    losses = {
        log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log
    }
    best = int(Path(trainer.state.best_model_checkpoint).name.rpartition("-")[2])
    assert best >= 6
    assert losses[best] == min(loss for step, loss in losses.items() if step >= 6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)
