"""Training on cached logits equals training on the teacher, step by step."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cached_losses import losses
from distilling import config, examples
from models import tiny

from hfslim import DistillationTrainer
from hfslim.distillation.cache.teacher_cache import CacheError, TeacherCache
from hfslim.distillation.teacher.teachers import Teachers
from hfslim.distillation.teacher.weights import fingerprint


@pytest.mark.parametrize("family", ["bert", "vit", "wav2vec2"])
def test_cached_equals_uncached_when_filled_and_when_read(family: str, tmp_path: Path) -> None:
    live = losses(tmp_path / "live", None, family)
    for run in ("fill", "read"):
        cached = losses(tmp_path / run, tmp_path / "cache", family)
        assert cached == pytest.approx(live, rel=0, abs=1e-5)
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [
        "keys.npy",
        "logits.npy",
        "meta.json",
        "order.npy",
    ]


def test_a_run_resumed_in_mid_epoch_reads_the_same(tmp_path: Path) -> None:
    whole = losses(tmp_path / "run", tmp_path / "cache")
    checkpoint = tmp_path / "run" / "checkpoint-4"
    resumed = losses(tmp_path / "run", tmp_path / "cache", resume=str(checkpoint))
    assert resumed == whole


def test_examples_that_changed_go_through_the_teacher(tmp_path: Path) -> None:
    student, cache = tiny("bert"), tmp_path / "cache"
    data = examples(student, count=8)
    for changed, expected in ((False, 1.0), (True, 0.5)):
        trainer = DistillationTrainer(
            student,
            config(tmp_path, teacher_cache=str(cache), max_steps=2, save_strategy="no"),
            teacher=tiny("bert", seed=1),
            train_dataset=data,
        )
        trainer._get_train_sampler = lambda *_: None
        if changed:
            data[5]["input_ids"] = data[5]["input_ids"].flip(0)
        trainer.train()
        assert trainer.state.log_history[0]["teacher_cache_hits"] == expected


def test_a_cache_of_another_teacher_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    losses(tmp_path / "run", cache)
    teacher = tiny("bert", seed=1)
    own = json.loads((cache / "meta.json").read_text())["teacher"]
    student, settings = tiny("bert"), config(tmp_path)
    assert own == Teachers([teacher], [None], student, None, settings).fingerprint() + "-no"
    with torch.no_grad():
        teacher.classifier.bias.add_(1)
    with pytest.raises(CacheError, match="outputs of another teacher"):
        TeacherCache(cache, Teachers([teacher], [None], student, None, settings).fingerprint())
    assert fingerprint(teacher, None) != fingerprint(teacher, torch.tensor([1, 0, 2]))
    logits = np.load(cache / "logits.npy")
    logits[3, 1] += 1
    np.save(cache / "logits.npy", logits)
    with pytest.raises(CacheError, match="has changed since it was written"):
        TeacherCache(cache, own)
    (cache / "keys.npy").write_bytes(b"half")
    with pytest.raises(CacheError, match="no whole teacher cache"):
        losses(tmp_path / "again", cache)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match="no whole teacher cache"):
        losses(tmp_path / "run", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_feature_losses_need_the_teacher_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher_cache holds logits alone"):
        config(tmp_path, teacher_cache="cache", feature_losses={"hidden_mse": 1.0})
