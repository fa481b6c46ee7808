"""Results as JSON, written cell by cell so that an interrupted run goes on, and two can share."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.environment import environment

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
                if not _same(data.setdefault(key, value), value):
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


def _same(first: Any, second: Any) -> bool:
    """Tell whether two values are alike; floats but for the rounding of other threads' sums."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-4)
    return first == second


def _find(data: Mapping[str, Any], kind: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
    return next((r for r in data[kind] if all(r[name] == key[name] for name in key)), None)
