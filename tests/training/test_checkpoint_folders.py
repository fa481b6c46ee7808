"""Checkpoints are there as a whole or not at all."""

import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from models import tiny
from safetensors.torch import load_file, save_file
from trainings import arguments, build, difference, examples
from transformers import Trainer, TrainerCallback

from hfslim import PruningCallback, SlimTrainer
from hfslim.training.checkpoint_folders import (
    STAGING,
    CheckpointError,
    last_whole,
    problem_of,
    rotate,
    save_whole,
    stage_errors,
)


def checkpoint(run: Path, step: int) -> Path:
    staged = run / STAGING / f"checkpoint-{step}"
    (staged / "deep").mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(b"12345678")
    (staged / "deep" / "state.pt").write_bytes(b"1234")
    save_whole(staged, run / staged.name)
    return run / staged.name


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda path: (path / "deep" / "state.pt").unlink(), "deep/state.pt is missing"),
        (lambda path: os.truncate(path / "model.safetensors", 3), "model.safetensors has 3 bytes"),
        (lambda path: (path / "checkpoint_files.json").write_text("{"), "json is damaged"),
        (lambda path: (path / "checkpoint_files.json").unlink(), "trainer_state.json is missing"),
        (lambda path: (path / "checkpoint-is-incomplete.txt").touch(), "was being written"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_known_and_passed_over(tmp_path, harm, told):
    before, last = (checkpoint(tmp_path, step) for step in (4, 12))
    assert last_whole(tmp_path) == (last, [])
    harm(last)
    assert told in problem_of(last)
    whole, broken = last_whole(tmp_path)
    assert whole == before
    assert len(broken) == 1 and broken[0].startswith(f"{last}: ")


def test_an_older_checkpoint_of_the_same_step_is_replaced(tmp_path):
    (checkpoint(tmp_path, 4) / "old").touch()
    path = checkpoint(tmp_path, 4)
    assert sorted(p.name for p in path.iterdir()) == [
        *("checkpoint_files.json", "deep", "model.safetensors")
    ]


@pytest.mark.parametrize("clock", [0, 1_000_000])
@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(1, None, [9]), (1, 3, [3, 9]), (2, None, [6, 9]), (None, 3, [3, 6, 9])],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, limit, best, kept, clock):
    """Also where the clock went back before the last one was written."""
    for step in (3, 6, 9):
        newest = checkpoint(tmp_path, step)
        ahead = newest.stat().st_mtime + clock * (step < 9) + step
        os.utime(newest, (ahead, ahead))
    rotate(newest, limit, best and str(tmp_path / f"checkpoint-{best}"))
    found = sorted(tmp_path.glob("checkpoint-*"))
    assert found == [tmp_path / f"checkpoint-{step}" for step in kept]


def trainer(
    run: Path, *callbacks: TrainerCallback, kind: type = SlimTrainer, **settings
) -> Trainer:
    model = build("bert")
    given = arguments(run, **settings)
    return kind(model, given, train_dataset=examples(model), callbacks=[*callbacks])


def test_resume_takes_the_last_whole_checkpoint(tmp_path, caplog):
    whole = trainer(tmp_path)
    with pytest.raises(ValueError, match="leave out resume_from_checkpoint to begin"):
        whole.train(resume_from_checkpoint=True)
    whole.train()
    os.truncate(tmp_path / "checkpoint-4" / "optimizer.pt", 100)
    with pytest.raises(CheckpointError, match=r"optimizer.pt has 100 bytes of .*checkpoint-2"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    resumed = trainer(tmp_path)
    with caplog.at_level(logging.WARNING, "hfslim"):
        resumed.train(resume_from_checkpoint=True)
    assert "passing over a checkpoint that is not whole" in caplog.text
    assert difference(whole.model, resumed.model) == 0.0
    assert problem_of(tmp_path / "checkpoint-4") is None
    assert not (tmp_path / STAGING).exists()


def test_a_finished_run_resumes_to_the_same_cut_model(tmp_path):
    def run() -> tuple[Trainer, PruningCallback]:
        callback = PruningCallback({"macs": 0.5}, interval=1)
        return trainer(tmp_path, callback, lr_scheduler_type="constant"), callback

    (whole, first), (again, second) = run(), run()
    whole.train()
    again.train(resume_from_checkpoint=True)
    assert first.structure == second.structure and not first.structure.is_full
    assert difference(whole.model, again.model) == 0.0
    assert again.state.global_step == 4
    assert first.scores.keys() == second.scores.keys() != set()
    assert all(torch.equal(second.scores[key], value) for key, value in first.scores.items())


class _Sends(TrainerCallback):
    """Sends the own process SIGTERM in the middle of a step, with two batches accumulated."""

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_after_the_step_and_exits(tmp_path):
    settings = {"gradient_accumulation_steps": 2, "save_steps": 100}

    def callback() -> PruningCallback:
        return PruningCallback({"macs": 0.5}, interval=1)

    whole = trainer(tmp_path / "whole", callback(), **settings)
    whole.train()
    before = signal.getsignal(signal.SIGTERM)
    told = trainer(tmp_path / "told", callback(), _Sends(), enable_jit_checkpoint=True, **settings)
    with pytest.raises(SystemExit) as stopped:
        told.train()
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert last_whole(tmp_path / "told") == (tmp_path / "told" / "checkpoint-2", [])
    resumed = trainer(tmp_path / "told", callback(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert difference(whole.model, resumed.model) == 0.0


class _SendsLate(TrainerCallback):
    """Sends the own process SIGTERM once there are no steps left."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("event", "strategy"),
    [("on_prediction_step", "no"), ("on_evaluate", "steps"), ("on_save", "steps")],
)
def test_sigterm_after_the_last_step_exits_too(tmp_path, event, strategy):
    def run(*callbacks: TrainerCallback) -> Trainer:
        model = build("bert")
        settings = arguments(
            tmp_path,
            save_strategy=strategy,
            eval_strategy="steps",
            eval_steps=4,
            enable_jit_checkpoint=True,
        )
        data = examples(model)
        return SlimTrainer(
            model,
            settings,
            train_dataset=data,
            eval_dataset=data,
            callbacks=[PruningCallback({"macs": 0.5}, interval=1), *callbacks],
        )

    whole = run()
    whole.train()
    told = run(_SendsLate(event))
    with pytest.raises(SystemExit) as stopped:
        told.train()
    assert stopped.value.code == 143
    assert last_whole(tmp_path) == (tmp_path / "checkpoint-4", [])
    resumed = run()
    resumed.train(resume_from_checkpoint=True)
    assert difference(whole.model, resumed.model) == 0.0


def test_the_stock_trainers_checkpoint_on_sigterm_is_refused_with_pruning(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    stock = trainer(
        tmp_path, PruningCallback({"macs": 0.5}), kind=Trainer, enable_jit_checkpoint=True
    )
    try:
        with pytest.raises(ValueError, match=r"in the middle of a step.*use hfslim\.SlimTrainer"):
            stock.train()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_checkpoint_that_fails_inside_a_stage_is_told_once(tmp_path):
    error = CheckpointError("checkpoint-6 could not be written: enforce fail at inline_container")
    with pytest.raises(CheckpointError) as failure, stage_errors("03-recover", tmp_path):
        raise error
    assert failure.value is error


def test_the_best_model_of_another_structure_is_not_brought_back(tmp_path, caplog):
    """Whatever the state says: here the first checkpoint, from before the last decision."""
    callback = PruningCallback({"macs": 0.5}, end=0.75, interval=1)
    seen = {}

    class Stuck(SlimTrainer):
        def _load_best_model(self) -> None:
            self.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
            seen.update({name: value.clone() for name, value in self.model.state_dict().items()})
            super()._load_best_model()
            assert all(torch.equal(seen[n], v) for n, v in self.model.state_dict().items())

    model = tiny("bert")
    settings = arguments(
        tmp_path, save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True
    )
    data = examples(model)
    run = Stuck(model, settings, train_dataset=data, eval_dataset=data, callbacks=[callback])
    with caplog.at_level(logging.WARNING, "hfslim"):
        run.train()
    assert seen and "the last weights are kept" in caplog.text
    saved = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    kept = saved["stateful_callbacks"]["PruningCallback"]["attributes"]["saved"]["structure"]
    assert kept != callback.structure.to_dict()


@pytest.mark.parametrize("merged", [False, True])
def test_a_checkpoint_that_its_owner_sharded_anew_resumes_as_before(
    tmp_path, merged: bool, caplog
) -> None:
    """Both ways: one file becomes shards, and shards become one file again."""
    model = tiny("bert")
    build_on = {"train_dataset": examples(model)}
    whole = SlimTrainer(tiny("bert"), arguments(tmp_path), **build_on)
    whole.train()
    folder = tmp_path / "checkpoint-2"
    tensors = load_file(folder / "model.safetensors")
    for size in ("20KB", *(["5GB"] if merged else [])):
        for path in folder.glob("model*.safetensors*"):
            path.unlink()
        save_torch_state_dict(tensors, folder, max_shard_size=size)
        with caplog.at_level(logging.INFO, "hfslim.training"):
            assert problem_of(folder) is None
        assert f"{folder}: its weights have been sharded anew and are all there" in caplog.text
        caplog.clear()
    assert (folder / "model.safetensors").is_file() == merged
    listed = json.loads((folder / "checkpoint_files.json").read_text())
    assert {n for n in listed if n.startswith("model")} == {
        path.name for path in folder.glob("model*")
    }
    again = SlimTrainer(tiny("bert"), arguments(tmp_path), **build_on)
    again.train(resume_from_checkpoint=str(folder))
    assert difference(again.model, whole.model) == 0.0


def _drop_a_tensor(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    tensors = load_file(shard)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, shard)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda folder: sorted(folder.glob("model-*.safetensors"))[0].unlink(), "are damaged"),
        (lambda folder: os.truncate(sorted(folder.glob("model-*"))[0], 900), "is not whole"),
        (_drop_a_tensor, "1 tensors are missing, such as "),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "there is neither model.safet"),
    ],
)
def test_shards_that_are_not_all_there_are_refused_with_the_way(tmp_path, harm, told) -> None:
    model = tiny("bert")
    SlimTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=examples(model)).train()
    folder = tmp_path / "checkpoint-2"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(tensors, folder, max_shard_size="20KB")
    harm(folder)
    problem = problem_of(folder)
    assert problem.startswith("model.safetensors is missing; ") and told in problem
    assert problem.endswith("on purpose, delete checkpoint_files.json in it")
