"""What a teacher cache keeps: the likeliest classes, or what feature losses need."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cached_features import FEATURES, trained
from distilling import config, examples
from models import tiny
from torch.nn import functional as F

from hfslim import DistillationTrainer
from hfslim.distillation.cache.teacher_cache import CacheError, TopK
from hfslim.distillation.losses.logit_losses import kl_divergence


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_rest_keeps_its_probability_and_kl_is_that_of_all_of_it(temperature: float) -> None:
    torch.manual_seed(0)
    teacher, student = 3 * torch.randn(5, 8), torch.randn(5, 8)
    filled = TopK.fill(*TopK(3, temperature).keep(teacher), 8)
    p, ours = (F.softmax(x / temperature, -1) for x in (teacher, filled))
    top = teacher.topk(3).indices
    torch.testing.assert_close(ours.gather(1, top), p.gather(1, top), rtol=0, atol=1e-6)
    rest = 1 - p.gather(1, top).sum(1)
    log_q = F.log_softmax(student / temperature, -1)
    expected = []
    for i in range(5):
        others = [c for c in range(8) if c not in top[i]]
        kept = (p[i, top[i]] * (p[i, top[i]].log() - log_q[i, top[i]])).sum()
        share = rest[i] / 5
        expected.append(kept + sum(share * (share.log() - log_q[i, c]) for c in others))
    loss = kl_divergence(student, filled, temperature) / temperature**2
    torch.testing.assert_close(loss, torch.stack(expected), rtol=0, atol=1e-6)
    assert (filled.argmax(-1) == teacher.argmax(-1)).all()


def test_a_cache_of_the_likeliest_teaches_nearly_the_same_and_is_smaller(tmp_path: Path) -> None:
    whole = trained(tmp_path / "a", None)
    for _ in range(2):
        few = trained(tmp_path / "b", tmp_path / "few", teacher_cache_top_k=5)
        # One class of six is left over, and its logit is that of the rest: nothing is lost.
        for one, other in zip(few, whole, strict=True):
            assert one["loss_distillation"] == pytest.approx(other["loss_distillation"], abs=1e-5)
    less = trained(tmp_path / "c", tmp_path / "less", teacher_cache_top_k=2)
    assert less[0]["loss_distillation"] < whole[0]["loss_distillation"]
    assert less[0]["agreement"] == whole[0]["agreement"]
    with pytest.raises(CacheError, match="other weights, labels or settings"):
        trained(tmp_path / "d", tmp_path / "less", teacher_cache_top_k=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_loss": "dkd"}, "dkd needs all of them"),
        ({"logit_loss": "dist"}, "dist needs all of them"),
        ({"temperature_end": 1.0}, "a temperature_end needs all of them"),
        ({"teacher_cache_top_k": 0}, "expected 1 or more"),
        ({"teacher_cache": None}, "set teacher_cache"),
        ({"teacher_cache_features": True}, "name some"),
        (
            {"teacher_cache_features": True, "feature_losses": {"minilm": 1.0}},
            "minilm compares attention maps",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{"teacher_cache": "cache", "teacher_cache_top_k": 2, **settings})


def test_keeping_all_classes_or_those_that_do_not_compete_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path, teacher_cache=str(tmp_path / "c"), teacher_cache_top_k=3)
    for kind, message in (
        ("single_label_classification", "there are 3 classes"),
        ("multi_label_classification", "this is multi_label"),
    ):
        student = tiny("bert", problem_type=kind)
        teacher = tiny("bert", seed=1, problem_type=kind)
        trainer = DistillationTrainer(
            student, settings, teacher=teacher, train_dataset=examples(student)
        )
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "how",
    [{}, {"layer_map": "dynamic"}, {"layers": 2, "layer_map": "last"}, {"family": "vit"}],
    ids=["uniform", "dynamic", "last", "vit"],
)
def test_cached_features_teach_the_same_step_by_step(
    how: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = {"feature_losses": FEATURES, **how}
    live = trained(tmp_path / "live", None, **shared)
    names = ["loss", "loss_distillation", *(f"loss_{name}" for name in FEATURES)]
    for run in ("fill", "read"):
        caplog.clear()
        cached = trained(tmp_path / run, tmp_path / "c", teacher_cache_features=True, **shared)
        assert len(live) == len(cached) == 4
        for one, other in zip(cached, live, strict=True):
            for name in names:
                assert one[name] == pytest.approx(other[name], rel=0, abs=1e-5), name
        assert ("GB are free" in caplog.text) is (run == "fill")


def test_what_does_not_fit_the_disk_is_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Full)
    # 18 examples of up to 12 positions, of 3 layers and 3 vectors of 32 numbers each.
    with pytest.raises(CacheError, match=r"18 examples, about 6 positions of 192 numbers.*leave"):
        trained(tmp_path, tmp_path / "c", feature_losses=FEATURES, teacher_cache_features=True)
    assert not list(tmp_path.glob("c*"))


def test_damaged_hidden_states_are_refused(tmp_path: Path) -> None:
    settings = {"feature_losses": {"hidden_mse": 1.0}, "teacher_cache_features": True}
    trained(tmp_path, tmp_path / "c", **settings)
    path = tmp_path / "c" / "positions.f32"
    data = bytearray(path.read_bytes())
    for change, message in ((data[:-4], "no whole teacher cache"), (data, "has changed")):
        change[5] ^= 1
        path.write_bytes(change)
        with pytest.raises(CacheError, match=message):
            trained(tmp_path, tmp_path / "c", **settings)
