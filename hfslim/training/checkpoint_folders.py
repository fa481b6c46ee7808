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
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from hfslim.reporting.staged_writes import flush, put_in_place, write_whole

logger = logging.get_logger(__name__)

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
_SINGLE = "model.safetensors"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
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
    (staged / _FILES).write_text(_list_of(staged), encoding="utf-8")
    flush(staged)
    discard(target)
    put_in_place(staged, target)


def _list_of(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _FILES)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return json.dumps(sizes, indent=1)


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
    that is written last, `trainer_state.json`. Where the weights have been sharded anew since, and
    all are there, the list is written anew.
    """
    if not folder.is_dir():
        return "there is no such folder"
    if (folder / _INCOMPLETE).exists():
        return "it was being written when the process ended"
    try:
        sizes = json.loads((folder / _FILES).read_text(encoding="utf-8"))
        problems = {
            name: problem
            for name, size in sizes.items()
            if (problem := _problem_of_file(folder / name, name, size)) is not None
        }
    except FileNotFoundError:
        return (
            None if (folder / "trainer_state.json").is_file() else "trainer_state.json is missing"
        )
    except ValueError:
        return f"{_FILES} is damaged"
    others = [problem for name, problem in problems.items() if not _WEIGHTS.fullmatch(name)]
    if others or not problems:
        return others[0] if others else None
    problem = _problem_of_weights(folder, {n: s for n, s in sizes.items() if _WEIGHTS.fullmatch(n)})
    if problem is not None:
        return (
            f"{next(iter(problems.values()))}; {problem}. If you changed its weights on purpose, "
            f"delete {_FILES} in it"
        )
    logger.info(f"{folder}: its weights have been sharded anew and are all there")
    with suppress(OSError):
        write_whole(folder / _FILES, _list_of(folder))
    return None


def _problem_of_file(path: Path, name: str, size: int) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    found = path.stat().st_size
    return None if found == size else f"{name} has {found:,} bytes of {size:,}"


def _problem_of_weights(folder: Path, listed: dict[str, int]) -> str | None:
    """Return why the weights of a folder are not those that its list has, in other shards."""
    index, single = folder / f"{_SINGLE}.index.json", folder / _SINGLE
    if not index.is_file() and not single.is_file():
        return f"there is neither {_SINGLE} nor {index.name}"
    try:
        where = {} if single.is_file() else json.loads(index.read_text("utf-8"))["weight_map"]
        tensors = {name: _tensors(folder / name) for name in {*where.values()} or {_SINGLE}}
    except (OSError, ValueError, KeyError, struct.error) as error:
        return f"its weights are damaged: {error}"
    absent = [key for key, name in where.items() if key not in tensors[name]]
    if absent:
        return f"{len(absent)} tensors are missing, such as {absent[0]}"
    was = sum(size for name, size in listed.items() if not name.endswith(".json"))
    now = sum(size for own in tensors.values() for size in own.values())
    # The list has the size of the headers too, some 100 bytes for each tensor.
    count = sum(map(len, tensors.values()))
    if not 0 <= was - now <= 4096 + 512 * count:
        return f"the tensors have {now:,} bytes of about {was:,}"
    return None


def _tensors(path: Path) -> dict[str, int]:
    """Return the bytes of each tensor of a whole safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length)) if length < path.stat().st_size else None
    if header is None:
        raise ValueError(f"{path.name} is not whole")
    header.pop("__metadata__", None)
    ends = [one["data_offsets"] for one in header.values()]
    if 8 + length + max((end for _, end in ends), default=0) != path.stat().st_size:
        raise ValueError(f"{path.name} is not whole")
    return {name: one["data_offsets"][1] - one["data_offsets"][0] for name, one in header.items()}


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
