"""The manifest of a run: the stages that are finished, so that a second run continues."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from hfslim.reporting.readable_json import readable_json
from hfslim.reporting.staged_writes import write_whole

FILE = "manifest.json"
ABSENT = "not set"


class OutputError(ValueError):
    """The output folder holds something that the run must not overwrite."""


@dataclass
class StageRecord:
    """The record of a stage that has begun.

    Attributes:
        name: The stage's name.
        folder: Its folder inside the output folder.
        settings: Its keys in the recipe.
        finished: Whether its results are complete.
        metrics: Metrics of its model.
        structure: Rows of `Structure.table`, if the stage removed units.
        units: Rows of `unit_rows`, if the stage removed units.
        steps: Number of training steps.
        series: The logged figures, from `training_curves`.
    """

    name: str
    folder: str
    settings: dict[str, Any]
    finished: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    structure: list[dict[str, Any]] = field(default_factory=list)
    units: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    series: dict[str, Any] = field(default_factory=dict)


@dataclass
class Manifest:
    """The settings of a recipe outside its stages, and the records of its stages in order.

    Attributes:
        folder: The output folder.
        base: Task, model, data, metric, training, seed.
        stages: Records of the stages that have begun.
    """

    folder: Path
    base: dict[str, Any]
    stages: list[StageRecord] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, base: Mapping[str, Any]) -> Manifest:
        """Read the manifest of an earlier run of the same recipe, or make one; write nothing.

        Raises:
            OutputError: The folder holds something else, or another recipe's results.
        """
        path = folder / FILE
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"output_dir {str(folder)!r} is a file: set output_dir to a folder")
        if not path.exists():
            # An interrupted first write, and the check of a shared folder, leave hidden files.
            found = {p.name for p in folder.iterdir()} if folder.exists() else set()
            others = sorted(name for name in found if not name.startswith("."))
            if others:
                raise OutputError(
                    f"output_dir {str(folder)!r} holds {', '.join(others[:5])} and no {FILE}, "
                    "so it is not the result of a recipe; nothing was touched: "
                    "set another output_dir"
                )
            return cls(folder, _plain(base))
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            records = [StageRecord(**one) for one in saved["stages"]]
            manifest = cls(folder, saved["base"], records)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise OutputError(
                f"{path} is damaged ({error!r}); nothing was touched: set another output_dir"
            ) from error
        advice = f"{folder} holds its results: set another output_dir"
        _refuse_changes(manifest.base, _plain(base), "the recipe", advice)
        return manifest

    def check(self, names: list[str], settings: list[Mapping[str, Any]]) -> None:
        """Compare the records with the stages of the recipe, and drop those without a folder.

        Raises:
            OutputError: A stage has changed since it ran, or an earlier one has no folder any more.
        """
        gone = next(
            (i for i, e in enumerate(self.stages) if not (self.folder / e.folder).is_dir()), None
        )
        if gone is not None:
            left = [e.folder for e in self.stages[gone:] if (self.folder / e.folder).is_dir()]
            if left:
                raise OutputError(
                    f"{self.folder / self.stages[gone].folder} is gone, but {', '.join(left)} came "
                    "after it: delete these too to run again from there"
                )
            del self.stages[gone:]
        for number, record in enumerate(self.stages):
            where = ", ".join(str(self.folder / e.folder) for e in self.stages[number:])
            advice = f"delete {where} to run again from there, or set another output_dir"
            if number >= len(names) or names[number] != record.name:
                now = names[number] if number < len(names) else "no stage"
                raise OutputError(
                    f"stage {number + 1} was {record.name}, now it is {now}: {advice}"
                )
            place = f"stage {number + 1} ({record.name})"
            _refuse_changes(record.settings, _plain(settings[number]), place, advice)

    def finished(self, stages: int) -> bool:
        """Return whether this many stages are finished."""
        return sum(record.finished for record in self.stages) == stages

    def begin(self, name: str, folder: str, settings: Mapping[str, Any]) -> StageRecord:
        """Return the record of a stage, which is added if there is none."""
        record = next((e for e in self.stages if e.folder == folder), None)
        if record is None:
            record = StageRecord(name, folder, _plain(settings))
            self.stages.append(record)
        return record

    def write(self) -> None:
        """Write the manifest atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"base": self.base, "stages": [asdict(record) for record in self.stages]}
        write_whole(self.folder / FILE, readable_json(content))


def on_disk(folder: Path) -> str:
    """Return the text of a folder's manifest; an empty string if there is none."""
    path = folder / FILE
    return path.read_text(encoding="utf-8") if path.is_file() else ""


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Lock a folder against other runs inside the block.

    The folder is made if it does not exist. The operating system releases the lock when the process
    ends, however that happens.

    Yields:
        Whether no other run has the lock; True if the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        yield True
        return
    handle, free = os.open(folder, os.O_RDONLY), True
    try:
        with suppress(OSError):
            free = lock_descriptor(handle, blocking=False)
        yield free
    finally:
        os.close(handle)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as JSON reads them back, so that equal ones compare equal."""
    return json.loads(json.dumps(values))


def _refuse_changes(old: Any, new: Any, place: str, advice: str) -> None:
    changes = sorted(_changes(old, new, ""))
    if changes:
        raise OutputError(f"{place} has changed since it ran: {'; '.join(changes)}. {advice}")


def _changes(old: Any, new: Any, place: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in old.keys() | new.keys():
            path = f"{place}.{key}" if place else key
            found += _changes(old.get(key, ABSENT), new.get(key, ABSENT), path)
        return found
    return [] if old == new else [f"{place} was {old!r}, now {new!r}"]
