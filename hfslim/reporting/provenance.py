"""The provenance of a model: base model, teacher, data, losses and machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

__all__ = ["Machine", "Origin", "Provenance"]

PACKAGES = ("hfslim", "transformers", "torch", "accelerate", "datasets")


@dataclass(frozen=True)
class Origin:
    """A model or a data set from which a model was made.

    Attributes:
        name: Its Hub id, or a name for it if it is not on the Hub.
        on_hub: Whether `name` is a Hub id.
        revision: The commit that was read, if known.
        config: Configuration of a data set.
        split: Split of a data set.
    """

    name: str
    on_hub: bool = False
    revision: str | None = None
    config: str | None = None
    split: str | None = None

    @classmethod
    def of_model(cls, source: str) -> Origin:
        """Return the origin of a model that was loaded from a folder or from the Hub.

        Args:
            source: Folder, Hub id, or Hub id with a revision as `id@revision`.
        """
        if Path(source).exists():
            return cls(Path(source).resolve().name)
        source, _, asked = source.partition("@")
        found = try_to_load_from_cache(source, "config.json", revision=asked or None)
        revision = Path(found).parent.name if isinstance(found, str) else None
        return cls(source, on_hub=True, revision=revision)

    def __str__(self) -> str:
        parts = (self.config, self.split, self.revision and f"revision {self.revision}")
        return ", ".join([self.name, *(part for part in parts if part)])


@dataclass(frozen=True)
class Machine:
    """The machine on which times were measured.

    Attributes:
        hardware: Processors and accelerators.
        system: Operating system.
        versions: Versions of Python and of the main libraries.
    """

    hardware: str
    system: str
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def here(cls) -> Machine:
        """Return the machine of this process."""
        versions = {"python": platform.python_version()}
        for package in PACKAGES:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
        affine = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
        parts = [f"{_processor()}, {len(affine(0))} cores"]
        if torch.cuda.is_available():
            names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
            parts += [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
        return cls("; ".join(parts), f"{platform.system()} {platform.machine()}", versions)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return "; ".join(part for part in (self.hardware, self.system, versions) if part)


@dataclass(frozen=True)
class Provenance:
    """The models, data, losses and machine with which a compressed model was made.

    Attributes:
        task: transformers' name of the task, such as `text-classification`.
        base: The model at the start; None if it was untrained.
        teacher: The teacher of the distillation; None if there was none.
        data: The examples.
        losses: The loss of each training stage, by the stage's number and name.
        seeds: Seeds of the runs over which the metric was averaged.
        processes: Number of processes of the launch.
        machine: The machine on which times were measured.
    """

    task: str | None = None
    base: Origin | None = None
    teacher: Origin | None = None
    data: Origin | None = None
    losses: Mapping[str, str] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    processes: int = 1
    machine: Machine | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Provenance:
        """Rebuild the provenance from `dataclasses.asdict`."""
        parts: dict[str, Any] = dict(values)
        made = {"base": Origin, "teacher": Origin, "data": Origin, "machine": Machine}
        for name, make in made.items():
            if parts.get(name) is not None:
                parts[name] = make(**parts[name])
        parts["seeds"] = tuple(parts.get("seeds", ()))
        return cls(**parts)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
