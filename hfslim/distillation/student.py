"""Make a student from a teacher's own layers, heads, neurons and dimensions."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.model_state import check_state
from hfslim.anatomy.structure import Kind, Structure
from hfslim.anatomy.units import Units
from hfslim.pruning.scores.batches import Batches
from hfslim.pruning.scores.collect import collect
from hfslim.pruning.scores.importance import magnitude
from hfslim.pruning.scores.layers import spaced_layers
from hfslim.pruning.search.plain_config import Stream, main_stream, stream_of
from hfslim.pruning.search.pool import Pool
from hfslim.pruning.search.uniform import equal_layers
from hfslim.pruning.surgery.surgery import shrink

logger = logging.getLogger(__name__)

__all__ = ["init_from_teacher", "student_structure"]


def init_from_teacher(
    teacher: PreTrainedModel,
    layers: int | Sequence[int] | None = None,
    heads: int | None = None,
    neurons: int | None = None,
    dimensions: int | None = None,
    data: Iterable[Mapping[str, Any]] | None = None,
    max_examples: int = 512,
    progress: bool = True,
) -> PreTrainedModel:
    """Make a smaller student from a teacher's weights, to be distilled from the teacher.

    Every layer keeps the same number of heads and of neurons, its most important ones, and the
    residual stream one set of dimensions. If the family's config can express the result (layers,
    neurons and most widths), the student loads without hfslim.

    Args:
        teacher: The trained classifier, which does not change.
        layers: The number of layers, evenly spaced over the depth (DistilBERT, Sanh et al. 2019,
            arXiv 1910.01108, takes every other one), or their numbers from 0. By default all.
        heads: Attention heads of each layer. By default all that `dimensions` allows.
        neurons: Neurons of each feed-forward layer. By default all.
        dimensions: Hidden size. In families whose head size is the hidden size by the number of
            heads, a multiple of the head size, which determines the number of heads.
        data: Batches of model inputs, with or without `labels`, on which units are scored by
            `fisher`. By default the largest weights stay, which is a worse start.
        max_examples: Maximum number of examples to score on, on each process.
        progress: Whether to show a progress bar.

    Returns:
        The student, of the teacher's class.

    Raises:
        ValueError: A number is out of range, or does not fit the others.

    Examples:
        student = init_from_teacher(teacher, layers=3)
        trainer = DistillationTrainer(model=student, teacher=teacher, ...)
    """
    structure = student_structure(
        teacher, layers, heads, neurons, dimensions, data, max_examples, progress
    )
    student = shrink(copy.deepcopy(teacher), structure)
    if getattr(student.config, "hfslim", None):
        logger.info("the student loads after `import hfslim`, or with trust_remote_code=True")
    return student


def student_structure(
    teacher: PreTrainedModel,
    layers: int | Sequence[int] | None = None,
    heads: int | None = None,
    neurons: int | None = None,
    dimensions: int | None = None,
    data: Iterable[Mapping[str, Any]] | None = None,
    max_examples: int = 512,
    progress: bool = True,
) -> Structure:
    """Choose the units of `init_from_teacher`, with its arguments.

    Raises:
        ValueError: A number is out of range, or does not fit the others.
    """
    check_state(teacher)
    asked: dict[Kind, int | None] = {"heads": heads, "neurons": neurons, "dimensions": dimensions}
    numbers = {kind: number for kind, number in asked.items() if number is not None}
    if layers is None and not numbers:
        raise ValueError("give layers, heads, neurons or dimensions of the student")
    units = find_units(teacher, dimensions is not None)
    entries = () if layers is None else _layers(teacher, units, layers).entries
    if not numbers:
        return Structure(entries)
    stream = _stream(teacher, units, numbers) if dimensions is not None else None
    narrow = units.of(numbers)
    widths = {kind: _units(kind, number, narrow, stream) for kind, number in numbers.items()}
    if data is None:
        scores = magnitude(teacher, narrow)
    else:
        batches = Batches(data, max_examples)
        scores = collect(teacher, narrow, batches, dict.fromkeys(numbers, "fisher"), 0, progress)
    gone = {f"{e.path}.{i}" for e in entries for i in set(range(e.total)) - set(e.kept)}
    inside = equal_layers(Pool(narrow, scores), widths, gone, stream)
    structure = Structure((*entries, *inside))
    logger.info("the student keeps %s", structure)
    return structure


def _layers(teacher: PreTrainedModel, units: Units, layers: int | Sequence[int]) -> Structure:
    if isinstance(layers, int):
        return spaced_layers(teacher, layers)
    lists = units.of(["layers"]).sites
    if len(lists) > 1:
        raise ValueError(
            f"layers={list(layers)}: the layers of {type(teacher).__name__} are in the lists "
            f"{[site.path for site in lists]}, so give their number"
        )
    numbers = list(layers)
    if numbers != sorted(set(numbers)):
        raise ValueError(
            f"layers={numbers}: give each layer once and in ascending order, such as "
            f"{sorted(set(numbers))}, as the student's layers keep the teacher's order"
        )
    [site] = lists
    return units.of(["layers"]).complete(
        Structure.of({"layers": {site.path: (set(layers), site.size)}})
    )


def _stream(teacher: PreTrainedModel, units: Units, numbers: dict[Kind, int]) -> Stream | None:
    """Check a hidden size, and set the number of heads if it follows from it."""
    wide = main_stream(units.of(["dimensions"]))
    entries, asked = sum(wide[0].cuts[0].widths), numbers["dimensions"]
    if asked % entries or not 0 < asked <= wide[0].size * entries:
        raise ValueError(
            f"dimensions={asked}: expected a multiple of {entries} up to {wide[0].size * entries}"
        )
    plain = stream_of(teacher)
    if plain is not None and plain.tied and "heads" not in numbers:
        by_width = {width * entries: h for h, width in plain.narrower}
        by_width[plain.size * entries] = plain.heads
        if asked not in by_width:
            raise ValueError(
                f"dimensions={asked}: a head's size follows from the hidden size, so give one of "
                f"{sorted(by_width)}; or give heads too, for a student that loads with hfslim only"
            )
        numbers["heads"] = by_width[asked] * plain.queries
    sites = tuple(site.path for site in wide)
    return plain or Stream(sites, wide[0].size, entries, 1, 1, 1, tied=False)


def _units(kind: Kind, number: int, units: Units, stream: Stream | None) -> int:
    """Convert a number of dimensions, neurons or heads to a number of units, or refuse it."""
    if kind == "dimensions":
        assert stream is not None
        return number // stream.entries
    sites = [site for site in units if site.kind == kind]
    per_unit = {site.heads.queries for site in sites} if kind == "heads" else {1}
    most = min(site.size for site in sites) * min(per_unit)
    step = max(per_unit)
    if not 0 < number <= most or number % step:
        raise ValueError(f"{kind}={number}: expected a multiple of {step} up to {most}")
    return number // step
