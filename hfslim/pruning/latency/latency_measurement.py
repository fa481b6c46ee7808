"""Measure a latency table: time each layer in forward passes of the model at many widths."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.progress import track
from scipy.optimize import isotonic_regression
from torch import nn
from transformers import PreTrainedModel

from hfslim.anatomy.structure import Entry, Key, Structure
from hfslim.anatomy.units import Site, Units
from hfslim.measuring.timing import describe_inputs, evaluating, mark, placed, seconds_between
from hfslim.pruning.latency.latency_table import (
    Curve,
    LatencyTable,
    layers_of,
    load_table,
    save_table,
    table_key,
)
from hfslim.pruning.surgery.proof import attention_returns
from hfslim.pruning.surgery.surgery import cut_for_now
from hfslim.training.ranks import from_first_rank

logger = logging.getLogger(__name__)

MEASURED_WIDTHS = 17
"""Widths of a sub-layer that are measured; those between are interpolated."""
SAMPLES = 6
"""Times of each width, at least."""
CALLS = 2
"""Timed calls of each cut, after one that is not timed."""
SECONDS = 10.0
"""Time to measure for, within `SAMPLES` to `MOST · SAMPLES` times of each width."""
MOST = 8
REWEIGHTED = 20
"""Rounds of reweighting in the fit."""


def latency_table(
    model: PreTrainedModel,
    units: Units,
    inputs: Mapping[str, torch.Tensor],
    progress: bool = True,
) -> LatencyTable:
    """Return the latency table of a model from the cache, or as measured by `measure_table`.

    The table is the same on all ranks.
    """
    key = table_key(model, units, inputs)

    def loaded_or_measured() -> LatencyTable:
        table = load_table(key)
        if table is None:
            table = measure_table(model, units, inputs, progress)
            save_table(key, table)
        return table

    return from_first_rank(loaded_or_measured)


def measure_table(
    model: PreTrainedModel,
    units: Units,
    inputs: Mapping[str, torch.Tensor],
    progress: bool = True,
) -> LatencyTable:
    """Time every width of every sub-layer.

    The whole model runs with its layers cut to widths that are drawn anew for each cut, every width
    of every shape of layer equally often. Each layer is timed inside the model, so that caches are
    in the state of use. Layers of the same shape share their times. A layer's time is split into a
    part for each sub-layer and the rest, and the parts are scaled to add up to the model's time.

    Returns:
        The table; the model is as before.

    Raises:
        RuntimeError: The model does not run its layers as modules.
    """
    for one in units:
        if one.layers.runs or one.layers.beside or one.layers.ends:
            raise RuntimeError(
                f"{type(model).__name__} does not run the layers at {one.path!r} as modules of "
                "their own, so they cannot be timed; state the target in macs, or leave layers out "
                "of `units`"
            )
    inputs, step, layers = placed(model, inputs), aligned_step(model), layers_of(units)
    returns = attention_returns(model, units)
    with evaluating(model), Stopwatch(model, [*layers]) as watch:
        for _ in range(3):
            watch.run(inputs)
        shapes = _by_shape(model, layers, watch.shapes, step)
        least = max(shape.cuts_needed for shape in shapes)
        in_time = round(SECONDS / (1 + CALLS) / watch.seconds[""])
        cuts = min(max(in_time, least), MOST * least)
        logger.info("timing %d cuts of %s", cuts, type(model).__name__)
        whole, outside = [], []
        for number in track(range(cuts), "timing", disable=not progress, transient=True):
            watch.run(inputs)
            whole.append(watch.seconds[""])
            chosen = [entry for shape in shapes for entry in shape.draw(number)]
            with cut_for_now(model, units, units.complete(Structure(tuple(chosen))), returns):
                for call in range(1 + CALLS):
                    watch.run(inputs)
                    if call:
                        inside = sum(watch.seconds[path] for path in layers)
                        outside.append(watch.seconds[""] - inside)
                        for shape in shapes:
                            shape.note(watch.seconds)
    rest: dict[str, float] = {}
    site: dict[Key, Curve] = {}
    for shape in shapes:
        alone, curves = additive(shape.samples, shape.widths)
        rest |= dict.fromkeys(shape.sites, alone)
        for sites in shape.sites.values():
            site |= {s.key: c for s, c in zip(sites, curves, strict=True)}
    total = 1000 * float(np.median(whole))
    table = LatencyTable(total, rest, site, step, describe_inputs(inputs))
    # Neither part is ever 0, but on a stalled machine it may be measured so.
    inside = max(total - 1000 * float(np.median(outside)), 0.1 * total)
    factor = inside / max(total - table.outside, 1e-6)
    logger.info(
        "%s: %.2f ms, of which %.0f %% in its layers; their parts add up to %.3f of that",
        *(table.input, total, 100 * inside / total, 1 / factor),
    )
    return table.corrected(factor)


def aligned_step(model: nn.Module) -> int:
    """Return the number of neurons whose multiples the model's device computes without waste.

    They fill 64 bytes on a CPU, its widest vector, and elsewhere 128 bytes, a row of a tile of the
    tensor cores.
    """
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return max(1, (64 if parameter.device.type == "cpu" else 128) // parameter.element_size())


class Stopwatch:
    """A timer of modules inside the forward passes of a model.

    Attributes:
        seconds: Time of each module in the last run, by path; the whole model's at `""`.
        shapes: Shape of the first tensor argument of each module.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self.model = model
        self.modules = {path: model.get_submodule(path) for path in {"", *paths}}
        self.device = next(model.parameters()).device
        self.seconds: dict[str, float] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __enter__(self) -> Stopwatch:
        self._handles = []
        for path, module in self.modules.items():
            start, stop = self._hooks(path)
            self._handles.append(module.register_forward_pre_hook(start, with_kwargs=True))
            self._handles.append(module.register_forward_hook(stop))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def run(self, inputs: Mapping[str, Any]) -> None:
        """Run the model once.

        Raises:
            RuntimeError: A module was not reached.
        """
        self._marks: list[tuple[str, Any, Any]] = []
        self.model(**inputs)
        self.seconds = dict.fromkeys(self.modules, 0.0)
        for path, start, stop in self._marks:
            self.seconds[path] += seconds_between(start, stop)
        silent = sorted(set(self.modules) - {path for path, _, _ in self._marks})
        if silent:
            raise RuntimeError(
                f"{type(self.model).__name__} does not run {silent[:3]} as modules, so they cannot "
                "be timed; state the target in macs"
            )

    def _hooks(self, path: str) -> tuple[Any, Any]:
        begun: list[Any] = []

        def start(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            values = (*args, *kwargs.values())
            self.shapes[path] = next(tuple(v.shape) for v in values if torch.is_tensor(v))
            begun.append(mark(self.device))

        def stop(*_: object) -> None:
            self._marks.append((path, begun.pop(), mark(self.device)))

        return start, stop


class _Shape:
    """Layers of the same shape, the widths drawn for them, and their times.

    Attributes:
        sites: The sites in each layer, by the layer's path.
        widths: The widths to measure of each site in a layer.
        samples: Indices of the widths, and seconds.
    """

    def __init__(self, sites: Mapping[str, Sequence[Site]], step: int) -> None:
        self.sites = dict(sites)
        self.widths = [_widths(site, step) for site in next(iter(sites.values()))]
        self.samples: list[tuple[tuple[int, ...], float]] = []
        self._decks: list[list[int]] = [[] for _ in self.widths]
        self._drawn: dict[str, tuple[int, ...]] = {}

    @property
    def cuts_needed(self) -> int:
        most = max((len(widths) for widths in self.widths), default=1)
        return math.ceil(SAMPLES * most / (len(self.sites) * CALLS))

    def draw(self, seed: int) -> list[Entry]:
        """Draw a width of every site, each equally often."""
        shuffle = random.Random(seed).shuffle
        entries = []
        for path, sites in self.sites.items():
            for deck, widths in zip(self._decks, self.widths, strict=True):
                if not deck:
                    deck.extend(range(len(widths)))
                    shuffle(deck)
            self._drawn[path] = tuple(deck.pop() for deck in self._decks)
            for site, widths, index in zip(sites, self.widths, self._drawn[path], strict=True):
                entries.append(Entry(site.kind, site.path, tuple(range(widths[index])), site.size))
        return entries

    def note(self, seconds: Mapping[str, float]) -> None:
        """Add the times of the layers at the widths drawn last."""
        self.samples += [(drawn, seconds[path]) for path, drawn in self._drawn.items()]


def additive(
    samples: Sequence[tuple[tuple[int, ...], float]], widths: Sequence[tuple[int, ...]]
) -> tuple[float, list[Curve]]:
    """Split times into a rest and a part for each sub-layer, by least absolute deviations.

    The solution is found by iteratively reweighted least squares, so that stalls do not count.

    Args:
        samples: For each run, the index of each sub-layer's width, and the seconds.
        widths: The widths of each sub-layer, ascending from 0.

    Returns:
        Milliseconds without any unit, and the curve of each sub-layer, which never falls.

    Examples:
        >>> times = [((i, j), 0.001 * (5 + 2 * i + j)) for i in range(2) for j in range(3)]
        >>> rest, (heads, neurons) = additive(times, [(0, 4), (0, 16, 32)])
        >>> round(rest, 3), [round(heads.at(n), 3) for n in (0, 2, 4)], round(neurons.at(32), 3)
        (5.0, [0.0, 1.0, 2.0], 2.0)
    """
    drawn = np.array([indices for indices, _ in samples], dtype=int).reshape(len(samples), -1)
    times = 1000 * np.array([seconds for _, seconds in samples])
    columns = [np.ones(len(times))[:, None]]
    columns += [np.eye(len(w))[indices] for w, indices in zip(widths, drawn.T, strict=True)]
    design, weight = np.hstack(columns), np.ones(len(times))
    for _ in range(REWEIGHTED):
        root = np.sqrt(weight)
        found = np.linalg.lstsq(design * root[:, None], times * root)[0]
        missed = np.abs(times - design @ found)
        weight = 1 / np.maximum(missed, 1e-3 * times)
    rest, *parts = np.split(found, np.cumsum([1, *map(len, widths)])[:-1])
    for number, part in enumerate(parts):
        smooth = isotonic_regression(part).x
        rest = rest + smooth[0]
        parts[number] = smooth - smooth[0]
    curves = [Curve(w, tuple(part.tolist())) for w, part in zip(widths, parts, strict=True)]
    return max(float(rest[0]), 0.0), curves


def _by_shape(
    model: nn.Module,
    layers: Mapping[str, Sequence[Site]],
    inputs: Mapping[str, tuple[int, ...]],
    step: int,
) -> list[_Shape]:
    """Group layers that do the same work."""
    alike: dict[Any, dict[str, Sequence[Site]]] = {}
    for path, sites in layers.items():
        module = model.get_submodule(path)
        tensors = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
        alike.setdefault((type(module), inputs[path], tensors), {})[path] = sites
    return [_Shape(group, step) for group in alike.values()]


def _widths(site: Site, step: int) -> tuple[int, ...]:
    """Return the widths of a site to measure: the smallest, the largest, and some between."""
    step = step if site.kind == "neurons" else 1
    between = np.linspace(0, site.size, min(MEASURED_WIDTHS, site.size // step + 2))
    widths = {min(round(width / step) * step, site.size) for width in between}
    least = len(site.fixed)
    return tuple(sorted({least, site.size, *(width for width in widths if width > least)}))
