"""Let the second checkpoint of a run fail in every way that a disk can, then resume.

Usage: failing_disk.py FOLDER WAY...; `full` and `read-only` mount a tmpfs, so they need a mount
namespace of their own: `unshare -rm`.
"""

import ctypes
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from killed import Events, forked, structure_of, trainer_of
from transformers import TrainerCallback

from hfslim.training.checkpoint import CheckpointError
from hfslim.training.checkpoint_folders import last_whole


def limit(run: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))


def permission(run: Path) -> None:
    """Forbid writing, to root too: without CAP_DAC_OVERRIDE it is as anyone."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b110
    assert libc.capset(header, sets) == 0
    run.chmod(0o555)


def full(run: Path) -> None:
    subprocess.run(["dd", "if=/dev/zero", f"of={run}/ballast"], capture_output=True)


def read_only(run: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(run)], check=True)


def mended(run: Path, way: str) -> None:
    if way == "permission":
        run.chmod(0o755)
    elif way == "full":
        (run / "ballast").unlink()
    elif way == "read-only":
        subprocess.run(["mount", "-o", "remount,rw", str(run)], check=True)


WAYS: dict[str, Callable[[Path], None]] = {
    "limit": limit,
    "permission": permission,
    "full": full,
    "read-only": read_only,
}


class Sabotage(TrainerCallback):
    def __init__(self, run: Path, way: str) -> None:
        self.run, self.way = run, way

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            WAYS[self.way](self.run)


def train(run: Path, result: Path, way: str | None, resume: bool = False) -> None:
    trainer = trainer_of(run, Events(run, None), save_total_limit=None)
    if way:
        trainer.add_callback(Sabotage(run, way))
    try:
        trainer.train(resume_from_checkpoint=resume)
    except CheckpointError as error:
        whole, broken = last_whole(run)
        report = {"error": str(error), "whole": whole and whole.name, "broken": broken}
        report["hidden"] = [p.name for p in run.iterdir() if p.name.startswith(".")]
        print(json.dumps(report))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        result.with_suffix(".json").write_text(json.dumps(report))
        return
    torch.save(
        {"structure": structure_of(trainer).digest(), "weights": trainer.model.state_dict()}, result
    )


def main(folder: Path, ways: list[str]) -> None:
    torch.set_num_threads(1)
    assert forked(lambda: train(folder / "whole", folder / "whole.pt", None)) == 0
    for way in ways:
        run, result = folder / way, folder / f"{way}.pt"
        run.mkdir()
        if way in ("full", "read-only"):
            command = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(run)]
            subprocess.run(command, check=True)
        assert forked(lambda run=run, result=result, way=way: train(run, result, way)) == 0
        mended(run, way)
        # A small disk holds no more checkpoints than it did.
        assert forked(lambda run=run, result=result: train(run, result, None, True)) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
