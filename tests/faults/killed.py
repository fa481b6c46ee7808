"""A gradual prune and distil run that kills itself with SIGKILL at a given event.

Events are what the run does in order: training batches, evaluation batches, and whatever it does to
files in its folder while it saves and deletes checkpoints.

Usage: killed.py FOLDER POINTS SEED. Each trial is a process of its own, forked from this one, which
computes nothing, so that torch and transformers are imported once.
"""

import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from models import tiny

from hfslim import DistillationConfig, DistillationTrainer, PruningCallback
from hfslim.training.checkpoint_folders import STAGING, last_whole

STEPS, EVERY = 9, 3
FILES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


class Events:
    """Counts what happens, and kills the process at one of them."""

    def __init__(self, folder: Path, at: int | None) -> None:
        self.folder, self.at, self.seen = str(folder.resolve()), at, []
        sys.addaudithook(self._file)

    def happens(self, kind: str) -> None:
        self.seen.append(kind)
        if len(self.seen) - 1 == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _file(self, event: str, arguments: tuple) -> None:
        # A tree is deleted by names relative to its folders.
        deletes = event in ("os.remove", "os.rmdir") and not Path(arguments[0]).is_absolute()
        if deletes or (event in FILES and self.folder in str(arguments[0])):
            self.happens("deletion" if deletes else "saving")


def trainer_of(folder: Path, events: Events, **settings: Any) -> DistillationTrainer:
    """Return a Trainer that prunes its student by half under a hidden-state loss."""
    set_seed(0)
    texts = torch.randint(64, (40, 10), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": texts.tolist(), "labels": (texts[:, 0] % 3).tolist()})
    teacher = tiny("bert", seed=1, hidden_size=48)
    arguments = DistillationConfig(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 8 // int(os.environ.get("WORLD_SIZE", "1")),
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "eval_strategy": "steps",
            "eval_steps": EVERY,
            "save_steps": EVERY,
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "feature_losses": {"hidden_mse": 1.0},
            "hidden_projection": True,
            "layer_map": "dynamic",
            "allow_untrained_teacher": True,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        | settings
    )

    class Counting(DistillationTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            events.happens("step")
            return super().training_step(*args, **kwargs)

        def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
            events.happens("evaluation")
            return super().prediction_step(*args, **kwargs)

    return Counting(
        model=tiny("bert", seed=2),
        args=arguments,
        teacher=teacher,
        train_dataset=data,
        eval_dataset=data.select(range(16)),
        callbacks=[PruningCallback({"macs": 0.5}, end=0.7, interval=2)],
    )


def structure_of(trainer: DistillationTrainer) -> Any:
    callbacks = trainer.callback_handler.callbacks
    return next(c for c in callbacks if isinstance(c, PruningCallback)).structure


def train(folder: Path, result: Path, at: int | None, resume: bool) -> None:
    events = Events(folder, at)
    trainer = trainer_of(folder, events)
    there = resume and last_whole(folder)[0] is not None
    trainer.train(resume_from_checkpoint=there)
    digest = structure_of(trainer).digest()
    saved = {"structure": digest, "weights": trainer.model.state_dict(), "events": events.seen}
    torch.save(saved, result)


def forked(work: Callable[[], None]) -> int:
    """Run something in a process of its own; return the signal or exit code that ended it."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def unreadable(folder: Path) -> list[str]:
    """Read every file of every checkpoint that a resume could take."""
    bad = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            load_file(checkpoint / "model.safetensors")
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                torch.load(checkpoint / name, weights_only=False)
        except Exception as error:
            bad.append(f"{checkpoint.name}: {error!r}")
    return bad


def points_of(seen: list[str], number: int, seed: int) -> list[int]:
    """Draw moments: of each kind of event first, then of all."""
    draw = random.Random(seed)
    kinds = ("saving", "step", "evaluation", "deletion")
    # Once there is a checkpoint to resume from.
    first = [i for i, kind in enumerate(seen) if kind == "step"][EVERY]
    late = [i for i in range(len(seen)) if i > first]
    found = [draw.choice([i for i in late if seen[i] == kind]) for kind in kinds]
    return (found + draw.sample(range(len(seen)), max(number - len(kinds), 0)))[:number]


def main(folder: Path, number: int, seed: int) -> None:
    torch.set_num_threads(1)
    whole = folder / "whole.pt"
    assert forked(lambda: train(folder / "whole", whole, None, False)) == 0
    expected = torch.load(whole)
    rows = []
    for trial, at in enumerate(points_of(expected["events"], number, seed)):
        run, result = folder / str(trial), folder / f"{trial}.pt"
        signalled = forked(lambda run=run, result=result, at=at: train(run, result, at, False))
        row: dict[str, Any] = {"at": at, "kind": expected["events"][at], "ended": signalled}
        row["unreadable"] = unreadable(run)
        row["staging"] = (run / STAGING).exists()
        last = get_last_checkpoint(str(run)) if run.is_dir() else None
        row["resumed_from"] = last and Path(last).name
        row["again"] = forked(lambda run=run, result=result: train(run, result, None, True))
        found = torch.load(result)
        row["structure"] = found["structure"] == expected["structure"]
        row["difference"] = max(
            (value.double() - found["weights"][name].double()).abs().max().item()
            for name, value in expected["weights"].items()
        )
        row["left"] = sorted(path.name for path in run.iterdir())
        rows.append(row)
    kinds = {kind: expected["events"].count(kind) for kind in set(expected["events"])}
    (folder / "rows.json").write_text(json.dumps({"events": kinds, "rows": rows}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
