"""Layer maps: the pairs of student and teacher layers that feature losses compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

__all__ = [
    "LAYER_MAPS",
    "LayerMap",
    "Pairs",
    "check_layers",
    "dynamic_pairs",
    "parse_map",
    "static_pairs",
]

LayerMap = Literal["uniform", "last", "skip", "dynamic"]
LAYER_MAPS: tuple[LayerMap, ...] = get_args(LayerMap)
Pairs = list[tuple[int, int]]
"""Numbers of student and teacher layers, from 0, ascending in both."""


def static_pairs(layer_map: str, student: int, teacher: int) -> Pairs:
    """Pair the layers of two models by their numbers alone.

    `uniform` spaces the layers evenly and ends with both last layers (TinyBERT, arXiv 1909.10351);
    `last` takes the teacher's last layers, `skip` every n-th layer (patient distillation, arXiv
    1908.09355). With a deeper student the roles are exchanged.

    Args:
        layer_map: `uniform`, `last` or `skip`.
        student: Number of the student's layers.
        teacher: Number of the teacher's layers.

    Returns:
        As many pairs as the shallower model has layers.

    Examples:
        >>> static_pairs("uniform", 3, 12)
        [(0, 3), (1, 7), (2, 11)]
        >>> static_pairs("last", 2, 4)
        [(0, 2), (1, 3)]
        >>> static_pairs("skip", 3, 8)
        [(0, 1), (1, 3), (2, 5)]
    """
    few, many = sorted((student, teacher))
    if layer_map == "last":
        far = [many - few + i for i in range(few)]
    elif layer_map == "skip":
        far = [(i + 1) * (many // few) - 1 for i in range(few)]
    else:
        far = [(i + 1) * many // few - 1 for i in range(few)]
    near = range(few)
    return list(zip(near, far, strict=True) if student <= teacher else zip(far, near, strict=True))


def dynamic_pairs(costs: np.ndarray) -> Pairs:
    """Assign to each teacher layer the student layer of least cost, keeping the order.

    The sum of the costs is minimal over all maps in which a later teacher layer never gets an
    earlier student layer. (CoFi, Xia et al. 2022, arXiv 2204.00408, minimise layer by layer.)

    Args:
        costs: Error of each student layer against each chosen teacher layer, `[teacher, student]`;
            infinite for student layers that must not be chosen.

    Returns:
        One pair per teacher layer, both counted along the axes; ties go to the earlier layer.

    Examples:
        >>> dynamic_pairs(np.array([[1.0, 0.0, 9.0], [0.0, 2.0, 3.0]]))
        [(0, 0), (0, 1)]
    """
    total = costs[0].astype(float)
    choices = []
    for row in costs[1:]:
        best = np.minimum.accumulate(total)
        choices.append([int(np.argmin(total[: i + 1])) for i in range(len(total))])
        total = best + row
    layer = int(np.argmin(total))
    layers = [layer]
    for choice in reversed(choices):
        layer = choice[layer]
        layers.append(layer)
    return [(student, teacher) for teacher, student in enumerate(reversed(layers))]


def parse_map(layer_map: str | Sequence[Sequence[int]] | None) -> str | Pairs:
    """Return the name of a layer map, or its pairs.

    Args:
        layer_map: A name of `LAYER_MAPS`, or pairs of layers as sequences or as JSON.

    Raises:
        ValueError: It is neither a known name nor a list of ascending pairs.

    Examples:
        >>> parse_map("[[0, 1], [1, 3]]")
        [(0, 1), (1, 3)]
    """
    if layer_map in LAYER_MAPS:
        return str(layer_map)
    try:
        given = json.loads(layer_map) if isinstance(layer_map, str) else layer_map
        pairs = [(student, teacher) for student, teacher in given or ()]
        whole = all(type(i) is int and i >= 0 for pair in pairs for i in pair)
        ascending = whole and all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(pairs))
    except (TypeError, ValueError):
        pairs, ascending = [], False
    if not pairs or not ascending:
        raise ValueError(
            f"layer_map is {layer_map!r}; expected one of {list(LAYER_MAPS)}, or pairs "
            "[[student layer, teacher layer], ...], counted from 0, in ascending order."
        )
    return pairs


def check_layers(pairs: Pairs, sizes: Sequence[int]) -> None:
    """Raise ValueError if a pair names a layer beyond the numbers of layers of the two models."""
    for s, t in pairs:
        if s >= sizes[0] or t >= sizes[1]:
            raise ValueError(
                f"layer_map pairs layer {s} of the student with {t} of the teacher; they have "
                f"{sizes[0]} and {sizes[1]}, counted from 0."
            )
