"""Checkpoint folders that exist as a whole or not at all, whatever kills the process.

A checkpoint is written into `STAGING`, flushed to the disk, and renamed into place; it is renamed
out of place before it is deleted. Each holds a list of its files, by which a folder that was
deleted or copied in part is recognised.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import sort_checkpoints

from hfslim.reporting.staged_writes import flush, put_in_place

__all__ = [
    "STAGING",
    "CheckpointError",
    "checkpoint_errors",
    "discard",
    "last_whole",
    "problem_of",
    "rotate",
    "save_whole",
    "stage_errors",
]

STAGING = ".saving"
"""Folder beside the checkpoints for those that are being written or deleted."""
_FILES = "checkpoint_files.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_INCOMPLETE = "checkpoint-is-incomplete.txt"
"""File in the stock Trainer's checkpoint on SIGTERM while it is written."""
_TORCH = ("PytorchStreamWriter", "inline_container")
"""Names in the message of `torch.save` where a write fails."""
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Error numbers of a disk that is full or read-only."""


class CheckpointError(RuntimeError):
    """A checkpoint, or a stage's folder, cannot be written or is not whole."""


def save_whole(staged: Path, target: Path) -> None:
    """Move a written checkpoint into place in one step, with a list of its files.

    Both are on one file system; an older checkpoint in the place is replaced.
    """
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in files}
    listed = staged / _FILES
    listed.write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    flush(staged)
    discard(target)
    put_in_place(staged, target)


def discard(folder: Path) -> None:
    """Delete a checkpoint; it is never seen in part."""
    if not folder.exists():
        return
    gone = folder.parent / STAGING / f"deleted-{folder.name}"
    shutil.rmtree(gone, ignore_errors=True)
    gone.parent.mkdir(exist_ok=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def problem_of(folder: Path) -> str | None:
    """Return why a checkpoint is not whole, or None if it is.

    A checkpoint of the stock Trainer has no list of its files and counts as whole with the file
    that is written last, `trainer_state.json`.
    """
    if not folder.is_dir():
        return "there is no such folder"
    if (folder / _INCOMPLETE).exists():
        return "it was being written when the process ended"
    try:
        sizes = json.loads((folder / _FILES).read_text(encoding="utf-8"))
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes of {size:,}"
    except FileNotFoundError:
        if not (folder / "trainer_state.json").is_file():
            return "trainer_state.json is missing"
    except ValueError:
        return f"{_FILES} is damaged"
    return None


def last_whole(run: Path) -> tuple[Path | None, list[str]]:
    """Return the last whole checkpoint in a folder, and the problem of each later one."""
    found = {
        int(match[1]): path
        for path in (run.iterdir() if run.is_dir() else ())
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    broken: list[str] = []
    for _, path in sorted(found.items(), reverse=True):
        problem = problem_of(path)
        if problem is None:
            return path, broken
        broken.append(f"{path}: {problem}")
    return None, broken


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond a limit, but neither the best nor the newest.

    The newest is given because the clock may have gone back since the others were written.
    """
    if not limit or limit <= 0:
        return
    found = [Path(path) for path in sort_checkpoints(str(newest.parent), use_mtime=True)]
    protected = {path for path in (newest, Path(best or "")) if path in found}
    surplus = len(found) - max(limit, len(protected))
    for path in [path for path in found if path not in protected][: max(surplus, 0)]:
        discard(path)


@contextmanager
def checkpoint_errors(name: str, run: Path) -> Iterator[None]:
    """Raise CheckpointError where a checkpoint cannot be written inside the block.

    The message names the checkpoint from which training resumes.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch and safetensors raise errors of their own for a full disk.
        if isinstance(error, RuntimeError) and not _of_torch(error):
            raise
        shutil.rmtree(run / STAGING, ignore_errors=True)
        whole, _ = last_whole(run)
        left = f"{whole.name} is whole, resume goes on from it" if whole else "there is no other"
        raise _unwritten(name, run, error, left) from error


@contextmanager
def stage_errors(name: str, folder: Path) -> Iterator[None]:
    """Raise CheckpointError where a stage cannot be written into a recipe's folder in the block.

    Other errors stay.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        refused = isinstance(error, OSError) and error.errno in _REFUSED
        forbidden = isinstance(error, PermissionError) and str(folder) in str(error)
        if not (refused or forbidden or _of_torch(error) or "while serializing" in str(error)):
            raise
        left = "the stages before are whole, the same command goes on from there"
        raise _unwritten(name, folder, error, left) from error


def _of_torch(error: Exception) -> bool:
    return any(name in str(error) for name in _TORCH)


def _unwritten(name: str, folder: Path, error: Exception, left: str) -> CheckpointError:
    return CheckpointError(
        f"{name} could not be written into {folder}: {error}; {_free(folder)} free there. "
        f"{left}; free space, or make the folder writable, or set another output_dir"
    )


def _free(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB"
