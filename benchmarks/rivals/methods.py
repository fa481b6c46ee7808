"""The methods, by name; of those with several settings the best on training examples is taken."""

import copy
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

import hfslim
from benchmarks.rivals import depgraph
from benchmarks.rivals.problem import Cut, Problem
from hfslim.anatomy.structure import Key, Structure
from hfslim.anatomy.units import Units
from hfslim.pruning import CRITERIA
from hfslim.pruning.scores import importance
from hfslim.pruning.surgery.batch_norms import renew_batch_norms

TIE = 0.01


def cut_by_hfslim(problem: Problem, budget: float, **choices: str) -> PreTrainedModel:
    """`hfslim.prune`, with its defaults unless something is chosen."""
    result = hfslim.prune(
        problem.copy(),
        problem.calibration,
        target={"macs": budget},
        units=problem.kinds,
        inputs=problem.inputs,
        seed=problem.seed,
        progress=False,
        **choices,
    )
    return result.model


def remove_layers(problem: Problem, budget: float, placement: str) -> PreTrainedModel:
    """Keep as many layers as come closest to the budget, of two that are as close the more."""
    sites = list(hfslim.find_units(problem.teacher).of(["layers"]))
    layers = [(site.path, index) for site in sites for index in site.removable]
    nearest, best = float("inf"), problem.copy()
    for depth in range(0 if all(site.fixed for site in sites) else 1, len(layers) + 1):
        kept = {layers[index] for index in PLACEMENTS[placement](len(layers), depth)}
        by_list = {
            site.path: (
                [i for i in range(site.size) if i in site.fixed or (site.path, i) in kept],
                site.size,
            )
            for site in sites
        }
        model = problem.copy()
        hfslim.shrink(model, Structure.of({"layers": by_list}))
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
    """Make a new model of the family and depth, evenly narrower, its weights not trained."""
    fresh = type(problem.teacher)(copy.deepcopy(problem.teacher.config)).eval()
    scores = importance.random_scores(problem.units, problem.seed)
    return _narrow(problem, budget, fresh, scores)


def cut_evenly(
    problem: Problem,
    budget: float,
    score: Callable[[PreTrainedModel, Units, int], Mapping[Key, torch.Tensor]],
) -> PreTrainedModel:
    """Remove as many units of each layer, those of the lowest scores; no weight changes."""
    scores = score(problem.teacher, problem.units, problem.seed)
    return _narrow(problem, budget, problem.teacher, scores)


def _narrow(
    problem: Problem, budget: float, whole: PreTrainedModel, scores: Mapping[Key, torch.Tensor]
) -> PreTrainedModel:
    """Keep in each layer the budget's share of heads, at least one, and the neurons it leaves.

    Of channels everywhere the same share.
    """

    def narrow(others: float) -> PreTrainedModel:
        share = {"heads": budget, "neurons": others, "channels": others}
        kept: dict[str, dict[str, tuple[list[int], int]]] = {kind: {} for kind in problem.kinds}
        for (kind, path), score in scores.items():
            best = score.topk(max(round(share[kind] * len(score)), 1)).indices
            kept[kind][path] = sorted(best.tolist()), len(score)
        return hfslim.shrink(copy.deepcopy(whole), Structure.of(kept))

    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        if problem.kept(narrow(middle)) <= budget:
            low = middle
        else:
            high = middle
    return narrow(low)


def _by(criterion: str) -> Mapping[str, Cut]:
    """Return what can be done with the scores of a criterion that looks at no data."""
    score = CRITERIA[criterion].weights
    assert score is not None
    return {
        "evenly in all layers": partial(cut_evenly, score=score),
        "hfslim's search and reconstruction": partial(cut_by_hfslim, criterion=criterion),
    }


METHODS: Mapping[str, Mapping[str, Cut]] = {
    "hfslim": {"defaults": cut_by_hfslim},
    "torch-pruning": depgraph.settings(),
    "layers": {name: partial(remove_layers, placement=name) for name in PLACEMENTS},
    "fine-tuned": {name: partial(remove_layers, placement=name) for name in PLACEMENTS},
    "small student": {"narrow": small_student},
    "magnitude": _by("magnitude"),
    "random": _by("random"),
}

LABELS_ALONE = frozenset({"fine-tuned"})
"""Methods whose models are trained on the labels, without the teacher."""


def cut(problem: Problem, method: str, setting: str, budget: float) -> PreTrainedModel:
    """Cut by a method, and let batch norms see what they get now, as they all need to."""
    model = METHODS[method][setting](problem, budget)
    renew_batch_norms(model, problem.calibration)
    return model
