"""The latency table of a model: what each width of each sub-layer takes on a device; its cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from hfslim.anatomy.structure import Key, Structure
from hfslim.anatomy.units import Site, Units
from hfslim.measuring.timing import describe_inputs
from hfslim.pruning.search.price import dropped_layers
from hfslim.pruning.target import Resource
from hfslim.reporting.staged_writes import write_whole

logger = logging.getLogger(__name__)

CACHE = "HFSLIM_CACHE"
VERSION = 1


@dataclass(frozen=True)
class Curve:
    """Milliseconds that the units of a sub-layer add to its layer.

    Attributes:
        widths: Numbers of units, ascending, from 0 to all.
        ms: Milliseconds at each, from 0, never falling.
    """

    widths: tuple[int, ...]
    ms: tuple[float, ...]

    def at(self, width: int) -> float:
        """Return the milliseconds at a number of units."""
        return float(np.interp(width, self.widths, self.ms))


@dataclass(frozen=True)
class LatencyTable:
    """The price in latency: what a model's parts take on a device at an input.

    Attributes:
        total: Milliseconds of the whole model.
        layer: Milliseconds of each layer without its units, by path.
        site: Milliseconds by number of units, of each site of heads or neurons.
        step: The number of neurons whose multiples the device computes without waste.
        input: The input and the device, in words.
    """

    resource: ClassVar[Resource] = "latency"
    total: float
    layer: Mapping[str, float]
    site: Mapping[Key, Curve]
    step: int = 1
    input: str = ""

    @property
    def outside(self) -> float:
        """Milliseconds outside of all layers and sub-layers."""
        inside = sum(self.layer.values()) + sum(curve.ms[-1] for curve in self.site.values())
        return self.total - inside

    def of(self, units: Units, structure: Structure) -> float:
        """Return the milliseconds of the model once it is cut to a structure."""
        dropped = dropped_layers(units, structure)
        narrow = [site for site in units if site.kind != "layers" and site.layer not in dropped]
        return (
            self.outside
            + sum(ms for path, ms in self.layer.items() if path not in dropped)
            + sum(self.site[s.key].at(len(structure.kept(s.kind, s.path))) for s in narrow)
        )

    def corrected(self, factor: float) -> LatencyTable:
        """Return the table with every saving multiplied by a factor; the whole model stays."""
        return replace(
            self,
            layer={path: ms * factor for path, ms in self.layer.items()},
            site={
                key: Curve(curve.widths, tuple(ms * factor for ms in curve.ms))
                for key, curve in self.site.items()
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; `from_dict` is its inverse."""
        return {
            "total": self.total,
            "layer": dict(self.layer),
            "site": {" ".join(key): [c.widths, c.ms] for key, c in self.site.items()},
            "step": self.step,
            "input": self.input,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyTable:
        """Rebuild a table from `to_dict`'s result."""
        site: dict[Key, Curve] = {}
        for key, (widths, ms) in data["site"].items():
            kind, _, path = key.partition(" ")
            site[kind, path] = Curve(tuple(widths), tuple(ms))
        return cls(data["total"], data["layer"], site, data["step"], data["input"])


def layers_of(units: Units) -> dict[str, list[Site]]:
    """Return the sites in each layer; those outside of any layer by the nearest numbered module."""
    layers: dict[str, list[Site]] = {
        f"{site.path}.{i}": [] for site in units if site.kind == "layers" for i in range(site.size)
    }
    for site in units:
        if site.kind != "layers":
            numbered = re.match(r"(.*\.\d+)(\.|$)", site.path)
            path = site.layer or (numbered[1] if numbered else "")
            layers.setdefault(path, []).append(site)
    return layers


def cache_folder() -> Path:
    """Return the folder of the tables: `$HFSLIM_CACHE`, or `hfslim` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE) or Path(home) / "hfslim").expanduser()


def table_key(
    model: PreTrainedModel, units: Units, inputs: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Return everything that a table depends on, from the device's name to the inputs' shapes."""
    parameter = next(model.parameters())
    shapes = sorted((name, list(p.shape)) for name, p in model.named_parameters())
    return {
        "version": VERSION,
        "device": device_name(parameter.device),
        "threads": torch.get_num_threads(),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attention": model.config._attn_implementation,
        "model": type(model).__name__,
        "shapes": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
        "inputs": describe_inputs(inputs),
        "units": sorted({site.kind for site in units}),
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load_table(key: Mapping[str, Any]) -> LatencyTable | None:
    """Read a table from the cache; None if there is none."""
    path = _path(key)
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["conditions"] != key:
            return None
        table = LatencyTable.from_dict(saved["table"])
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%r) and is measured anew", path, error)
        return None
    logger.info("latency table from %s", path)
    return table


def save_table(key: Mapping[str, Any], table: LatencyTable) -> None:
    """Write a table to the cache, in one step."""
    path = _path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"conditions": key, "table": table.to_dict()}, indent=1))
    logger.info("latency table kept in %s", path)


def _path(key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "latency" / f"{key['model']}-{digest}.json"
