"""Results as JSON, written cell by cell so that an interrupted run goes on, and two can share."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "torch-pruning")
KEY = ("method", "budget", "seed")


class Results:
    """One benchmark's file: its settings, the runs that added to it, choices and cells."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {"runs": [], "choices": [], "cells": []}
        return json.loads(self.path.read_text(encoding="utf-8"))

    def begin(self, benchmark: Mapping[str, Any]) -> int:
        """Add a run on this machine, and return its number.

        Args:
            benchmark: What all cells of the file share.

        Raises:
            SystemExit: The file's cells were made with other settings.
        """
        with self._changed() as data:
            for key, value in json.loads(json.dumps(benchmark)).items():
                if data.setdefault(key, value) != value:
                    raise SystemExit(
                        f"error: {self.path} holds cells for {key} {data[key]!r}, this run has "
                        f"{value!r}: give another --output"
                    )
            data["runs"].append(environment())
            return len(data["runs"]) - 1

    def find(self, kind: str, **key: Any) -> dict[str, Any] | None:
        """Return the finished choice or cell of a key, if there is one."""
        return _find(self.read(), kind, key)

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """Add a choice or a cell, unless another process was first."""
        with self._changed() as data:
            key = {name: row[name] for name in KEY if name in row}
            if _find(data, kind, key) is None:
                data[kind].append(row)

    @contextmanager
    def _changed(self) -> Iterator[dict[str, Any]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            data = self.read()
            yield data
            fresh = self.path.with_suffix(".tmp")
            fresh.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            fresh.replace(self.path)


def environment() -> dict[str, Any]:
    """Return what a reader needs to judge or repeat the figures."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _find(data: Mapping[str, Any], kind: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
    return next((r for r in data[kind] if all(r[name] == key[name] for name in key)), None)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.processor() or platform.machine())}, {os.cpu_count()} cores"
