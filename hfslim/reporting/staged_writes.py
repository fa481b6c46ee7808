"""Files and folders that appear as a whole or not at all, whatever kills the process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["flush", "put_in_place", "whole_folder", "write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step: a crash leaves the old one or the new one."""
    staged = _sibling(path)
    try:
        staged.write_text(text, encoding="utf-8")
        flush(staged)
        put_in_place(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Write a folder in one step: a crash leaves none.

    Args:
        target: Does not exist, or is empty; its parents are made.

    Yields:
        A hidden sibling to write into. It becomes the target at the end of the block, and is
        deleted where an error ends the block.

    Raises:
        OSError: The target is not empty any more.
    """
    staged = _sibling(target)
    staged.mkdir(parents=True)
    try:
        yield staged
        flush(staged)
        if target.exists():
            target.rmdir()
        put_in_place(staged, target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def flush(path: Path) -> None:
    """Make the operating system write a file, or a folder with all that is in it, to the disk."""
    for one in (*path.rglob("*"), path):
        if one.is_file() or one.is_dir():
            _flush(one)


def put_in_place(staged: Path, target: Path) -> None:
    """Rename a flushed file or folder to its target on the same file system, durably."""
    staged.replace(target)
    _flush(target.parent)


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _flush(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
