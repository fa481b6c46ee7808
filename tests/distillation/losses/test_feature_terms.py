"""Distillation from features: through a Trainer, while gates close, on pruned students."""

from pathlib import Path

import pytest
import torch
from distilling import config, examples
from feature_trainings import terms, trained
from models import tiny
from safetensors.torch import load_file
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
    set_seed,
)

import hfslim
from hfslim import DistillationTrainer, PruningCallback
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.layer_modules import layer_modules
from hfslim.distillation.losses.capture import Capture
from hfslim.distillation.losses.feature_losses import FEATURE_LOSSES

HIDDEN = ("hidden_mse", "hidden_cosine", "hidden_l1_cosine")


class KeepProjections(TrainerCallback):
    def on_train_end(self, *args: object, **kwargs: object) -> None:
        weights = self.trainer.features.terms.projections.state_dict()
        self.weights = {name: value.clone() for name, value in weights.items()}


@pytest.mark.parametrize("family", ["bert", "vit", "wav2vec2", "whisper", "distilbert"])
def test_every_layer_is_recorded_as_the_model_reports_it(family: str) -> None:
    model = tiny(family).eval()
    inputs = example_inputs(model, batch_size=2, length=4000 if family == "wav2vec2" else 12)
    capture = Capture(model, hidden=True, attentions=False, vectors=True)
    with torch.no_grad(), capture.recording() as seen:
        outputs = model(**inputs, output_hidden_states=True)
    layers = [tuple(h.shape) for h in outputs.hidden_states[1:]]
    assert [tuple(h.shape) for h in seen.hidden] == layers[-len(seen.hidden) :]
    # The last hidden state may be normed after the last layer; those before are the layers' own.
    for ours, theirs in zip(seen.hidden[:-1], outputs.hidden_states[1:-1], strict=True):
        assert torch.equal(ours, theirs)
    assert [v.shape[:2] for v in seen.vectors] == [seen.hidden[0].shape[:2]] * 3
    left = [hook for m in model.modules() for hook in m._forward_hooks.values()]
    assert not [hook for hook in left if "hfslim" in hook.__module__]


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_each_loss_is_zero_at_equality_and_teaches(name: str, tmp_path: Path) -> None:
    set_seed(0)
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    student, teacher = tiny("bert", **options), tiny("bert", seed=1, **options).eval()
    batch = example_inputs(student, batch_size=3, length=8)
    batch["attention_mask"][0, 5:] = 0
    same = terms(student, student, name)
    with torch.no_grad():
        with same.captures[0].recording() as seen:
            student.eval()(**batch, **same.captures[0].arguments)
        loss = same.losses(seen, seen, batch)[name]
    floor = 0.3132617 if name == "hidden_l1_cosine" else 0.0
    assert (loss - floor).abs().max() < 1e-6
    weight = 1e3 if name == "attention" else 1.0
    trainer = trained(
        student, teacher, tmp_path, feature_losses={name: weight}, max_steps=40, alpha=0.0
    )
    logged = [e[f"loss_{name}"] for e in trainer.state.log_history if f"loss_{name}" in e]
    assert logged[-1] - floor < 0.7 * (logged[0] - floor)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_loss_is_the_weighted_sum_of_all_that_is_logged(tmp_path: Path) -> None:
    trainer = trained(
        tiny("bert"),
        tiny("bert", seed=1),
        tmp_path,
        alpha=0.4,
        feature_losses='{"hidden_mse": 2.0, "minilm_v2": 0.5}',
        gradient_accumulation_steps=3,
    )
    for entry in trainer.state.log_history[:-1]:
        weighted = 0.6 * entry["loss_hard"] + 0.4 * entry["loss_distillation"]
        weighted += 2 * entry["loss_hidden_mse"] + 0.5 * entry["loss_minilm_v2"]
        assert entry["loss"] == pytest.approx(weighted, rel=1e-5)
        assert 0 <= entry["agreement"] <= 1


def test_other_widths_need_a_projection_which_trains_resumes_and_is_not_exported(
    tmp_path: Path,
) -> None:
    narrow = {"hidden_size": 16, "intermediate_size": 32}
    with pytest.raises(ValueError, match="hidden_projection=True"):
        terms(tiny("bert", **narrow), tiny("bert"), "hidden_mse")
    states, maps = [], []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        set_seed(0)
        student, keep = tiny("bert", **narrow), KeepProjections()
        keep.trainer = DistillationTrainer(
            student,
            config(tmp_path, feature_losses={"hidden_mse": 1.0}, hidden_projection=True),
            teacher=tiny("bert", seed=1),
            train_dataset=examples(student),
            callbacks=[keep],
        )
        keep.trainer.train(resume_from_checkpoint=resume)
        states.append(student.state_dict())
        maps.append(keep.weights)
    fresh = terms(tiny("bert", **narrow), tiny("bert"), "hidden_mse", projection=True)
    start = fresh.projections.state_dict()
    assert list(maps[0]) == ["16-32.weight"] == list(start)
    assert (maps[0]["16-32.weight"] - start["16-32.weight"]).abs().max() > 1e-3
    assert torch.equal(maps[0]["16-32.weight"], maps[1]["16-32.weight"])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not [name for name in states[0] if "16-32" in name]
    keep.trainer.save_model(str(tmp_path / "out"))
    for folder in ("checkpoint-4", "out"):
        names = load_file(tmp_path / folder / "model.safetensors")
        assert not [name for name in names if "16-32" in name]
    beside = load_file(tmp_path / "checkpoint-4" / "distillation.safetensors")
    assert list(beside) == ["16-32.weight"]
    assert not (tmp_path / "out" / "distillation.safetensors").exists()


def test_a_dynamic_map_follows_the_layers_and_resumes(tmp_path: Path) -> None:
    states = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        set_seed(0)
        student = tiny("bert", num_hidden_layers=3)
        trained(
            student,
            tiny("bert", seed=1, num_hidden_layers=6),
            tmp_path,
            feature_losses={"hidden_mse": 1.0},
            layer_map="dynamic",
            resume=resume,
        )
        states.append(student.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("layer_map", ["uniform", "last", "dynamic"])
def test_closed_layers_are_not_paired(layer_map: str) -> None:
    student, teacher = tiny("bert", num_hidden_layers=4), tiny("bert", num_hidden_layers=4, seed=1)
    ours = terms(student, teacher, "hidden_mse", layer_map=layer_map)
    units = hfslim.find_units(student)
    path = units.of(["layers"]).sites[0].path
    structure = hfslim.Structure.of({"layers": {path: ((0, 3), 4)}})
    with hfslim.gated(student, structure):
        assert {s for s, _ in ours.pairs()} <= {0, 3}
    assert len(layer_modules(student)) == 4


def test_pruning_with_feature_losses_shrinks_and_a_pruned_student_learns_on(
    tmp_path: Path,
) -> None:
    student, teacher = tiny("bert"), tiny("bert", seed=1)
    callback = PruningCallback(target={"macs": 0.5}, units=("heads", "neurons", "layers"))
    losses = {"hidden_mse": 1.0, "minilm_v2": 1.0}
    trained(student, teacher, tmp_path / "a", feature_losses=losses, callbacks=[callback])
    assert callback.structure is not None and not callback.structure.is_full
    trainer = trained(student, teacher, tmp_path / "b", feature_losses=losses)
    assert trainer.state.log_history[0]["loss_minilm_v2"] > 0


@pytest.mark.parametrize(
    "how",
    [{"criterion": "l0", "schedule": "linear"}, {"criterion": "fisher", "schedule": "iterative"}],
    ids=lambda how: how["criterion"],
)
def test_pruning_resumes_exactly_while_logits_and_features_are_distilled(
    tmp_path: Path, how: dict[str, str]
) -> None:
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        set_seed(0)
        student = tiny("bert")
        callback = PruningCallback({"macs": 0.6}, ("heads", "neurons", "layers"), end=0.7, **how)
        trainer = trained(
            student,
            tiny("bert", seed=1),
            tmp_path,
            feature_losses={"hidden_mse": 1.0, "minilm_v2": 1.0},
            layer_map="dynamic",
            callbacks=[callback],
            max_steps=8,
            save_steps=3,
            logging_steps=1,
            resume=resume,
        )
        runs.append((callback.structure, student.state_dict()))
    for entry in trainer.state.log_history[:-1]:
        assert {"loss_distillation", "loss_hidden_mse", "loss_minilm_v2"} <= set(entry)
    (structure, states), (again, resumed) = runs
    assert structure == again and not structure.is_full
    assert all(torch.equal(value, resumed[name]) for name, value in states.items())


def test_distilling_only_the_first_part_leaves_the_labels_alone(tmp_path: Path) -> None:
    trainer = trained(
        tiny("bert"), tiny("bert", seed=1), tmp_path, distil_until=0.5, logging_steps=1
    )
    names = [sorted(n for n in e if n.startswith("loss_")) for e in trainer.state.log_history[:-1]]
    assert names == [["loss_distillation", "loss_hard"]] * 2 + [["loss_hard"]] * 2


def test_weights_and_temperature_follow_their_schedules(tmp_path: Path) -> None:
    trainer = trained(
        tiny("bert"),
        tiny("bert", seed=1),
        tmp_path,
        alpha=0.8,
        alpha_end=0.0,
        temperature=4.0,
        temperature_end=1.0,
        feature_losses={"hidden_mse": 1.0},
        feature_weight_end=0.0,
        logging_steps=1,
    )
    for step, entry in enumerate(trainer.state.log_history[:-1]):
        alpha, factor = 0.8 * (1 - step / 4), 1 - step / 4
        weighted = (1 - alpha) * entry["loss_hard"] + alpha * entry["loss_distillation"]
        assert entry["loss"] == pytest.approx(
            weighted + factor * entry["loss_hidden_mse"], rel=1e-5
        )
    trainer.state.global_step = 2
    assert trainer._scheduled("temperature") == pytest.approx(2.5)


def test_what_cannot_be_compared_is_refused_with_the_fix(tmp_path: Path) -> None:
    bert, small = tiny("bert"), tiny("vit", image_size=8)
    with pytest.raises(ValueError, match="examples and positions"):
        terms(tiny("vit", image_size=16), small, "hidden_mse")
    with pytest.raises(ValueError, match="pairs layer 9 of the student"):
        terms(bert, tiny("bert"), "hidden_mse", layer_map=[(9, 0)])
    with pytest.raises(ValueError, match="relation_heads=7 does not divide"):
        terms(bert, tiny("bert"), "minilm_v2", relation_heads=7)
    with pytest.raises(ValueError, match="use_reentrant"):
        trained(
            tiny("bert"),
            tiny("bert", seed=1),
            tmp_path,
            feature_losses={"minilm_v2": 1.0},
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": True},
        )


@pytest.mark.parametrize("name", ["attention", "minilm", "minilm_v2"])
def test_a_model_without_attention_is_refused_with_the_fix(name: str) -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
    models = [ResNetForImageClassification(ResNetConfig(**sizes)) for _ in range(2)]
    with pytest.raises(ValueError, match="use a loss on hidden states"):
        terms(*models, name)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"feature_losses": {"hidden_mes": 1.0}}, "hidden_mes"),
        ({"feature_losses": {"hidden_mse": -1.0}}, "from 0 on"),
        ({"feature_losses": "{"}, "expected JSON"),
        ({"feature_losses": ["hidden_mse"]}, "expected a weight for each"),
        ({"feature_losses": '"hidden_mse"'}, "expected a weight for each"),
        ({"logit_loss": "mse"}, "logit_loss"),
        ({"distil_until": 0.0}, "distil_until"),
        ({"layer_map": "first"}, "layer_map"),
        ({"layer_map": None}, "layer_map is None"),
        ({"relation_heads": 0}, "relation_heads"),
        ({"alpha_end": 2.0}, "alpha_end"),
    ],
)
def test_settings_out_of_range_are_refused(
    setting: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **setting)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, tmp_path: Path) -> None:
    logged = []
    for checkpointing in (False, True):
        set_seed(0)
        student = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        names = {"hidden_mse": 1.0} if reentrant else {"hidden_mse": 1.0, "minilm_v2": 1.0}
        trainer = trained(
            student,
            tiny("bert", seed=1),
            tmp_path,
            feature_losses=names,
            activation_checkpointing=checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": reentrant},
            logging_steps=1,
        )
        logged.append([entry["grad_norm"] for entry in trainer.state.log_history[:-1]])
    assert logged[1] == pytest.approx(logged[0], rel=1e-4)
