"""What a pipeline has finished, kept beside its results so that a second run goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hfslim.reporting.readable_json import readable_json
from hfslim.reporting.staged_writes import write_whole

FILE = "manifest.json"
ABSENT = "not set"


class OutputError(ValueError):
    """The output folder holds something that this run must not overwrite."""


@dataclass
class Entry:
    """One stage that was begun.

    Attributes:
        name: The stage's name.
        folder: Its folder inside the output folder.
        settings: What the recipe said of it.
        finished: Whether its results are complete.
        metrics: Metrics of the model after it.
        structure: Rows of `Structure.table` where the stage cut the model.
        units: Rows of `unit_rows` where the stage cut the model.
        steps: Steps that it trained.
        series: What it logged, as of `training_curves`.
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
    """The recipe's settings outside its stages, and the stages in order.

    Attributes:
        folder: The output folder.
        base: Task, model, data, metric, training, seed.
        stages: Stages begun so far.
    """

    folder: Path
    base: dict[str, Any]
    stages: list[Entry] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, base: Mapping[str, Any]) -> Manifest:
        """Take up an earlier run of the same recipe, or begin; nothing is written yet.

        Raises:
            OutputError: The folder holds something else, or another recipe's results.
        """
        path = folder / FILE
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"output_dir {str(folder)!r} is a file: set output_dir to a folder")
        if not path.exists():
            # Of a run that was interrupted in its first moment this is all that is left.
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
            manifest = cls(folder, saved["base"], [Entry(**entry) for entry in saved["stages"]])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise OutputError(
                f"{path} is damaged ({error!r}); nothing was touched: set another output_dir"
            ) from error
        advice = f"{folder} holds its results: set another output_dir"
        _refuse_changes(manifest.base, _plain(base), "the recipe", advice)
        return manifest

    def check(self, names: list[str], settings: list[Mapping[str, Any]]) -> None:
        """Compare the stages begun with those of the recipe, and drop those whose folder is gone.

        Raises:
            OutputError: A stage has changed since it ran, or a later one outlives an earlier one.
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
        for number, entry in enumerate(self.stages):
            where = ", ".join(str(self.folder / e.folder) for e in self.stages[number:])
            advice = f"delete {where} to run again from there, or set another output_dir"
            if number >= len(names) or names[number] != entry.name:
                now = names[number] if number < len(names) else "no stage"
                raise OutputError(f"stage {number + 1} was {entry.name}, now it is {now}: {advice}")
            place = f"stage {number + 1} ({entry.name})"
            _refuse_changes(entry.settings, _plain(settings[number]), place, advice)

    def finished(self, stages: int) -> bool:
        """Tell whether this many stages are finished."""
        return sum(entry.finished for entry in self.stages) == stages

    def begin(self, name: str, folder: str, settings: Mapping[str, Any]) -> Entry:
        """Add a stage, or take up the one that was interrupted."""
        entry = next((e for e in self.stages if e.folder == folder), None)
        if entry is None:
            entry = Entry(name, folder, _plain(settings))
            self.stages.append(entry)
        return entry

    def write(self) -> None:
        """Write the manifest in one step: a crash leaves the old one or the new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"base": self.base, "stages": [asdict(entry) for entry in self.stages]}
        write_whole(self.folder / FILE, readable_json(content))


def on_disk(folder: Path) -> str:
    """Return the text of a folder's manifest; nothing where there is none."""
    path = folder / FILE
    return path.read_text(encoding="utf-8") if path.is_file() else ""


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Keep other runs out of a folder inside the block.

    The system lets go of it when the process ends, however that ends.

    Args:
        folder: It is made if it is not there.

    Yields:
        Whether no other run is inside; True where the file system cannot tell.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        yield True
        return
    import fcntl

    handle, free = os.open(folder, os.O_RDONLY), True
    try:
        with suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
        yield free
    finally:
        os.close(handle)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as they come back from JSON, so that they compare equal."""
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
