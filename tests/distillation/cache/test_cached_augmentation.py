"""Cached answers under augmentation: the same random numbers on every process and in every run."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from augmented_caches import trained
from distilling import config, examples
from models import tiny
from transformers import set_seed

from hfslim import DistillationTrainer
from hfslim.distillation.cache.examples import KeyedCollator, drawing_from
from hfslim.distillation.cache.teacher_cache import CachedBatch, CacheError, TeacherCache

KINDS = ("torch", "numpy", "python")


def figures(log: list[Any], name: str) -> list[float]:
    return [entry[name] for entry in log]


@pytest.mark.parametrize("kind", KINDS)
def test_two_epochs_of_augmentation_are_found_again(kind: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    log = trained(tmp_path / "fill", cache, kind, teacher_cache_epochs=2)
    assert figures(log, "teacher_cache_hits") == [1.0] * 15
    assert len(np.load(cache / "logits.npy")) == 20
    read = trained(tmp_path / "read", cache, kind, teacher_cache_epochs=2)
    assert figures(read, "loss") == figures(log, "loss")


def test_cached_augmentation_teaches_what_the_teacher_says_of_it(tmp_path: Path) -> None:
    cached = trained(tmp_path / "a", tmp_path / "cache", teacher_cache_epochs=3)
    live = trained(tmp_path / "b", None, live_epochs=3)
    expected = figures(live, "loss_distillation")
    assert figures(cached, "loss_distillation") == pytest.approx(expected, rel=0, abs=1e-5)


def test_a_run_resumed_in_mid_epoch_and_one_with_workers_read_the_same(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    whole = trained(tmp_path / "run", cache, teacher_cache_epochs=2, save_strategy="steps")
    checkpoint = str(tmp_path / "run" / "checkpoint-8")
    resumed = trained(tmp_path / "run", cache, teacher_cache_epochs=2, resume=checkpoint)
    assert figures(resumed, "loss") == figures(whole, "loss")
    assert figures(resumed, "teacher_cache_hits") == [1.0] * 15
    others = trained(tmp_path / "w", cache, teacher_cache_epochs=2, dataloader_num_workers=2)
    assert figures(others, "teacher_cache_hits") == [1.0] * 15


def test_without_it_augmented_examples_miss_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = trained(tmp_path, tmp_path / "cache")
    assert figures(log, "teacher_cache_hits") == [0.0] * 15
    assert caplog.text.count("is not in") == 1 and "teacher_cache_epochs" in caplog.text


def test_another_seed_or_number_of_epochs_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "a", tmp_path / "cache", teacher_cache_epochs=2)
    for other in ({"teacher_cache_epochs": 3}, {"teacher_cache_epochs": 2, "data_seed": 7}, {}):
        with pytest.raises(CacheError, match="settings of what is kept"):
            trained(tmp_path / "b", tmp_path / "cache", **other)


def test_drawing_from_a_key_leaves_the_streams_as_they_were() -> None:
    set_seed(0)
    expected = [torch.rand(2).tolist(), np.random.rand(), random.random()]
    set_seed(0)
    drawn = []
    for key in ((1, 2, 3), (1, 2, 3), (1, 2, 4)):
        with drawing_from(*key):
            drawn.append([torch.rand(2).tolist(), np.random.rand(), random.random()])
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[1], drawn[2], strict=True))
    assert [torch.rand(2).tolist(), np.random.rand(), random.random()] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_collator_that_mixes_examples_is_refused(kind: str, tmp_path: Path) -> None:
    draw = {"torch": lambda: torch.rand(1), "numpy": np.random.rand, "python": random.random}[kind]

    def mix(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        share = float(draw())
        images = torch.stack([row["pixel_values"] for row in rows])
        images = share * images + (1 - share) * images.flip(0)
        return {"pixel_values": images, "labels": torch.stack([row["labels"] for row in rows])}

    student = tiny("vit")
    trainer = DistillationTrainer(
        student,
        config(tmp_path, teacher_cache=str(tmp_path / "cache")),
        teacher=tiny("vit", seed=1),
        train_dataset=examples(student),
        data_collator=mix,
    )
    with pytest.raises(CacheError, match="draws random numbers, as mixup does"):
        trainer.train()
    assert not (tmp_path / "cache").exists()


def test_what_training_drops_from_an_epoch_is_cached_all_the_same(tmp_path: Path) -> None:
    student = tiny("bert")
    trainer = DistillationTrainer(
        student,
        config(
            tmp_path,
            teacher_cache=str(tmp_path / "cache"),
            dataloader_drop_last=True,
            save_strategy="no",
            logging_steps=1,
        ),
        teacher=tiny("bert", seed=1),
        train_dataset=examples(student, count=10),
    )
    trainer.train()
    log = trainer.state.log_history[:-1]
    assert figures(log, "teacher_cache_hits") == [1.0] * 4
    assert trainer.args.dataloader_drop_last and len(trainer.answers.cache) == 10


def test_lists_of_unequal_length_are_refused_with_the_fix() -> None:
    collate = KeyedCollator(lambda rows: {})
    with pytest.raises(CacheError, match=r"'boxes' holds list .* drop that column"):
        collate([{"input_ids": [1, 2], "boxes": [[1], [2, 3]]}])


def test_a_cache_that_another_run_has_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    keys, logits = torch.tensor([[1, 2], [3, 4]]), torch.eye(2)

    def answers():
        TeacherCache.write(tmp_path / "other", "teacher", iter([CachedBatch(keys, logits)]))
        (tmp_path / "other").rename(tmp_path / "cache")
        yield CachedBatch(keys, logits * 2)

    TeacherCache.write(tmp_path / "cache", "teacher", answers())
    cache = TeacherCache(tmp_path / "cache", "teacher")
    assert torch.equal(cache.logits(cache.find(keys)), logits)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_cache_epochs": 0}, "expected 1 or more"),
        ({"teacher_cache_epochs": 2, "teacher_cache": None}, "set teacher_cache"),
        (
            {
                "teacher_cache_epochs": 2,
                "dataloader_persistent_workers": True,
                "dataloader_num_workers": 1,
            },
            "dataloader_persistent_workers=False",
        ),
    ],
)
def test_epochs_that_cannot_be_kept_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{"teacher_cache": "cache", **settings})
