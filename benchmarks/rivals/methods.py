"""The methods, by name; of those with several settings the best on training examples is taken."""

import copy
from collections.abc import Mapping
from functools import partial

import numpy as np
from transformers import PreTrainedModel

import hfslim
from benchmarks.rivals import depgraph
from benchmarks.rivals.problem import Cut, Problem
from hfslim.structure import Structure

TIE = 0.01


def cut_by_hfslim(problem: Problem, budget: float, **choices: str) -> PreTrainedModel:
    """`hfslim.prune`, with its defaults unless something is chosen."""
    result = hfslim.prune(
        problem.copy(),
        problem.calibration,
        target={"macs": budget},
        inputs=problem.inputs,
        seed=problem.seed,
        progress=False,
        **choices,
    )
    return result.model


def remove_layers(problem: Problem, budget: float, placement: str) -> PreTrainedModel:
    """Keep as many layers as come closest to the budget, of two that are as close the more."""
    (site,) = hfslim.find_units(problem.teacher).of(["layers"])
    nearest, best = float("inf"), problem.copy()
    for depth in range(1, site.size + 1):
        kept = PLACEMENTS[placement](site.size, depth)
        model = problem.copy()
        hfslim.shrink(model, Structure.of({"layers": {site.path: (kept, site.size)}}))
        distance = abs(problem.kept(model) - budget)
        if distance <= nearest + TIE:
            nearest, best = distance, model
    return best


def _spread(layers: int, depth: int) -> list[int]:
    return [int(index) for index in np.linspace(0, layers - 1, depth).round()]


def _stride(layers: int, depth: int) -> list[int]:
    return [index * layers // depth for index in range(depth)]


def _first(layers: int, depth: int) -> list[int]:
    return list(range(depth))


PLACEMENTS = {
    "evenly, first and last kept": _spread,
    "evenly, from the first on": _stride,
    "the first": _first,
}


def small_student(problem: Problem, budget: float) -> PreTrainedModel:
    """Make a new model of the family and depth, evenly narrower, its weights not trained.

    Each layer has the budget's share of the heads, at least one, and the neurons that it leaves.
    """
    fresh = type(problem.teacher)(copy.deepcopy(problem.teacher.config)).eval()
    units = hfslim.find_units(fresh).of(["heads", "neurons"])

    def narrow(neurons: float) -> PreTrainedModel:
        share = {"heads": budget, "neurons": neurons}
        kept: dict[str, dict[str, tuple[range, int]]] = {"heads": {}, "neurons": {}}
        for site in units:
            number = max(round(share[site.kind] * site.size), 1)
            kept[site.kind][site.path] = range(number), site.size
        return hfslim.shrink(copy.deepcopy(fresh), Structure.of(kept))

    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        if problem.kept(narrow(middle)) <= budget:
            low = middle
        else:
            high = middle
    return narrow(low)


METHODS: Mapping[str, Mapping[str, Cut]] = {
    "hfslim": {"defaults": cut_by_hfslim},
    "torch-pruning": depgraph.settings(),
    "layers": {name: partial(remove_layers, placement=name) for name in PLACEMENTS},
    "fine-tuned": {name: partial(remove_layers, placement=name) for name in PLACEMENTS},
    "small student": {"narrow": small_student},
    "magnitude": {"hfslim, criterion magnitude": partial(cut_by_hfslim, criterion="magnitude")},
    "random": {"hfslim, criterion random": partial(cut_by_hfslim, criterion="random")},
}

LABELS_ALONE = frozenset({"fine-tuned"})
"""Methods whose models are trained on the labels, without the teacher."""
