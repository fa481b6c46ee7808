"""What feature losses compare is there, is the student's own, and is refused where it is not."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distilling import config, examples
from feature_trainings import terms, trained
from models import tiny
from transformers import AutoModelForAudioClassification, SEWConfig, set_seed

import hfslim
from hfslim import DistillationTrainer
from hfslim.distillation.losses import feature_losses
from hfslim.distillation.losses.capture import position_mask
from hfslim.distillation.losses.comparable import every_layer_runs

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def test_keys_that_dropout_leaves_out_cost_nothing() -> None:
    teacher = torch.tensor([[[[0.5, 0.25, 0.25]]]])
    dropped = torch.tensor([[[[0.5, 0.25, 0.0]]]]) / 0.9
    assert feature_losses.attention_kl(dropped, teacher).item() == pytest.approx(0, abs=1e-6)
    # Of the two keys that are left the teacher gives 2/3 and 1/3, the student half each.
    loss = feature_losses.attention_kl(torch.tensor([[[[0.6, 0.6, 0.0]]]]), teacher).item()
    expected = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert loss == pytest.approx(expected, abs=1e-6)


def test_minilm_of_a_copy_is_near_zero_under_attention_dropout(tmp_path: Path) -> None:
    student = tiny("bert", **{**STILL, "attention_probs_dropout_prob": 0.1})
    trainer = trained(
        student,
        copy.deepcopy(student),
        tmp_path,
        feature_losses={"minilm": 1.0},
        learning_rate=0.0,
    )
    assert trainer.state.log_history[0]["loss_minilm"] < 0.01


@pytest.mark.parametrize("name", ["hidden_l1_cosine", "minilm_v2"])
def test_a_student_that_drops_layers_itself_runs_them_all(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = tiny("wav2vec2", layerdrop=0.9)
    trainer = trained(student, tiny("wav2vec2", seed=1), tmp_path, feature_losses={name: 1.0})
    assert trainer.state.log_history[-1]["step"] == 4
    assert "skips layers at random (layerdrop=0.9)" in caplog.text
    assert student.config.layerdrop == 0.9


def test_layerdrop_of_a_module_is_switched_off_and_on() -> None:
    model = tiny("whisper", encoder_layerdrop=0.5)
    with every_layer_runs(model):
        assert model.encoder.layerdrop == 0.0
    assert model.encoder.layerdrop == 0.5


def test_frozen_lower_layers_are_no_obstacle_and_a_frozen_body_is(tmp_path: Path) -> None:
    student, teacher = tiny("bert"), tiny("bert", seed=1)
    student.bert.embeddings.requires_grad_(False)
    student.bert.encoder.layer[0].requires_grad_(False)
    before = student.bert.encoder.layer[2].output.dense.weight.clone()
    losses = {"hidden_mse": 1.0, "minilm_v2": 1.0}
    trained(student, teacher, tmp_path, feature_losses=losses)
    assert not torch.equal(student.bert.encoder.layer[2].output.dense.weight, before)
    hfslim.train_head_only(student)
    with pytest.raises(ValueError, match=r"no gradient reaches the hidden .*let layers train too"):
        trained(student, teacher, tmp_path, feature_losses=losses)


def test_a_dynamic_map_goes_by_attentions_where_hidden_states_are_not_compared(
    tmp_path: Path,
) -> None:
    student = tiny("bert", **STILL)
    teacher = tiny("bert", seed=1, num_hidden_layers=6, **STILL)
    ours = terms(student, teacher, "attention", layer_map="dynamic")
    assert ours.teacher_layers == [2, 5]
    batch = {k: v for k, v in examples(student)[0].items() if k != "labels"}
    batch = {name: value[None] for name, value in batch.items()}
    seen = []
    for capture in ours.captures:
        with torch.no_grad(), capture.recording() as one:
            capture.model(**batch, **capture.arguments)
        seen.append(one)
    loss = ours.losses(*seen, batch)["attention"]
    maps = [[a.mean(1)[0] for a in one.attentions] for one in seen]
    expected = [[(s - maps[1][t]).square().mean().item() for s in maps[0]] for t in (2, 5)]
    assert ours._costs.tolist() == [pytest.approx(row, rel=1e-4) for row in expected]
    # The first step pairs evenly.
    assert loss.item() == pytest.approx((expected[0][0] + expected[1][2]) / 2, rel=1e-4)
    trainer = trained(
        student, teacher, tmp_path, feature_losses={"attention": 1.0}, layer_map="dynamic"
    )
    assert trainer.state.log_history[0]["loss_attention"] > 0


@pytest.mark.parametrize("name", ["hidden_mse", "attention"])
@pytest.mark.parametrize("layer_map", ["uniform", [(1, 1), (2, 2)], [(0, 0), (1, 2)]])
def test_layers_that_gates_close_are_left_out_of_any_map(name: str, layer_map: object) -> None:
    student, teacher = tiny("bert"), tiny("bert", seed=1)
    ours = terms(student, teacher, name, layer_map=layer_map)
    path = hfslim.find_units(student).of(["layers"]).sites[0].path
    structure = hfslim.Structure.of({"layers": {path: ((0,), 3)}})
    batch = {k: v[None] for k, v in examples(student)[0].items() if k != "labels"}
    with hfslim.gated(student, structure), torch.no_grad():
        assert {s for s, _ in ours.pairs()} <= {0}
        seen = []
        for capture in ours.captures:
            with capture.recording() as one:
                capture.model(**batch, **capture.arguments)
            seen.append(one)
        loss = ours.losses(*seen, batch)[name]
    assert loss.shape == (1,) and (loss.item() == 0) is (layer_map == [(1, 1), (2, 2)])


def test_what_is_not_one_by_one_is_refused_with_the_fix() -> None:
    teacher = tiny("bert", seed=1)
    for heads in (1, 2):  # A single head would be compared with all of the teacher's.
        with pytest.raises(ValueError, match=rf"student has {heads} heads .* use minilm_v2"):
            terms(tiny("bert", num_attention_heads=heads), teacher, "minilm")
    with pytest.raises(ValueError, match="pairs layer 9 of the student"):
        terms(tiny("bert"), teacher, "attention", layer_map=[(9, 0)])
    small = tiny("vit", seed=1, patch_size=8)
    with pytest.raises(ValueError, match=r"attention maps .* examples and positions"):
        terms(tiny("vit"), small, "attention")
    for name in ("attention", "minilm_v2"):  # A window is no example.
        with pytest.raises(ValueError, match="examples and positions for the same 2 examples"):
            terms(tiny("swin"), tiny("swin", seed=1), name)
    with pytest.raises(ValueError, match=r"does not run the projections .* hidden states"):
        terms(tiny("wavlm"), tiny("wavlm", seed=1), "minilm_v2")


def test_attention_is_eager_for_as_long_as_its_maps_are_compared(tmp_path: Path) -> None:
    student, teacher = (tiny("bert", attention="sdpa", seed=seed) for seed in (0, 1))
    seen = []
    student.bert.register_forward_hook(lambda *_: seen.append(student.config._attn_implementation))
    trained(student, teacher, tmp_path, feature_losses={"attention": 1.0})
    assert set(seen) == {"eager"}
    assert [model.config._attn_implementation for model in (student, teacher)] == ["sdpa"] * 2


def test_patches_that_pad_an_image_do_not_count() -> None:
    mask = torch.tensor([[1, 1, 0, 0]])
    assert position_mask(tiny("vit"), {"pixel_attention_mask": mask}, 4) is mask


def test_a_model_that_returns_tuples_tells_its_attentions(tmp_path: Path) -> None:
    student, teacher = (tiny("bert", seed=seed, return_dict=False) for seed in (0, 1))
    trainer = trained(student, teacher, tmp_path, feature_losses={"attention": 1.0})
    assert trainer.state.log_history[0]["loss_attention"] > 0


def test_frames_that_layers_squeeze_are_masked_as_the_model_masks_them() -> None:
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"conv_dim": (16,) * 3, "conv_stride": (5, 4, 4), "conv_kernel": (10, 8, 4)}
    model = AutoModelForAudioClassification.from_config(
        SEWConfig(**settings, **sizes, intermediate_size=48, squeeze_factor=2, layerdrop=0.0)
    )
    mask = torch.ones(2, 1600, dtype=torch.long)
    mask[0, 800:] = 0
    # 800 samples are 9 frames, 1600 are 19; two frames make a position.
    found = position_mask(model, {"attention_mask": mask}, 9)
    assert found.sum(1).tolist() == [5, 9] and found[0].tolist() == [True] * 5 + [False] * 4
    with pytest.raises(ValueError, match="1600 positions of the attention mask into 13"):
        position_mask(model, {"attention_mask": mask}, 13)


def test_what_fsdp_leaves_no_way_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = projecting(tmp_path)
    trainer.is_fsdp_enabled = True
    for version, message in ((1, "fsdp_version: 2"), (2, "hidden_projection trains maps outside")):
        state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version))
        monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(state=state))
        with pytest.raises(ValueError, match=message), trainer.features.prepared():
            pass


def projecting(folder: Path, **parts: object) -> DistillationTrainer:
    set_seed(0)
    student = tiny("bert", hidden_size=16, intermediate_size=32)
    settings = config(folder, feature_losses={"hidden_mse": 1.0}, hidden_projection=True)
    teacher = tiny("bert", seed=1)
    if "optimizers" in parts:
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        schedule = parts["optimizers"]
        parts["optimizers"] = (optimizer, schedule and schedule(optimizer))
    return DistillationTrainer(
        student, settings, teacher=teacher, train_dataset=examples(student), **parts
    )


def test_a_second_training_has_projections_of_its_own_alone(tmp_path: Path) -> None:
    trainer = projecting(tmp_path)
    groups = []
    for resume in (None, None, str(tmp_path / "checkpoint-2")):
        trainer.train(resume_from_checkpoint=resume)
        groups.append([len(group["params"]) for group in trainer.optimizer.param_groups])
    assert groups[0] == groups[1] == groups[2] and groups[0][-1] == 1


def test_projections_train_in_an_optimizer_that_was_passed(tmp_path: Path) -> None:
    trainer = projecting(tmp_path, optimizers=None)
    trainer.train()
    assert [len(g["params"]) for g in trainer.optimizer.param_groups][-1] == 1

    def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)

    with pytest.raises(ValueError, match=r"optimizers=\(optimizer, None\)"):
        projecting(tmp_path, optimizers=constant).train()


def test_a_student_that_is_made_anew_is_the_one_that_learns(tmp_path: Path) -> None:
    trainer = DistillationTrainer(
        args=config(tmp_path, feature_losses={"hidden_mse": 1.0}),
        model_init=lambda: tiny("bert"),
        teacher=tiny("bert", seed=1, problem_type="single_label_classification"),
        train_dataset=examples(tiny("bert")),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss_hidden_mse"] > 0
    assert trainer.model.config.problem_type == "single_label_classification"
