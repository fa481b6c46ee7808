"""Scores of layers: by even spacing, or by the loss when layers are removed in turn."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.progress import Progress
from transformers import PreTrainedModel

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.structure import Key, Structure
from hfslim.anatomy.units import Units
from hfslim.measuring.timing import evaluating, placed
from hfslim.pruning.gates.gates import Gates
from hfslim.pruning.scores.batches import run_within_memory
from hfslim.pruning.scores.finite import check_finite
from hfslim.pruning.scores.importance import Scores, UnusableScoresError
from hfslim.pruning.search.best import best_structure
from hfslim.pruning.target import Target
from hfslim.training.objective import hard_loss, labelled, logits_of, problem_type

logger = logging.getLogger(__name__)


def spacing(size: int, fixed: Sequence[int] = ()) -> list[float]:
    """Score the layers of a list so that any number of remaining layers is evenly spaced.

    The list is halved repeatedly, to evenly spaced layers that include the first and the last.
    Within a halving, the next layer to remove is the one furthest from the ends and from the layers
    removed in the same halving. (Every other layer: Fan et al. 2019, arXiv 1909.11556; of twelve,
    the six that DistilBERT starts from, Sanh et al. 2019, arXiv 1910.01108.)
    Scores are the ranks of removal, in (0, 1].

    Examples:
        >>> [round(12 * score) for score in spacing(12)]
        [12, 4, 8, 3, 10, 1, 5, 7, 2, 9, 6, 11]
    """
    order, kept = list[int](), list(range(size))
    while len(kept) > 1:
        half = (len(kept) + 1) // 2
        step = (len(kept) - 1) / max(half - 1, 1)
        stay = {kept[round(i * step)] for i in range(half)}
        going, far_from = [layer for layer in kept if layer not in stay], [0, size - 1]
        while going:
            layer = max(going, key=lambda one: min(abs(one - other) for other in far_from))
            going.remove(layer)
            order.append(layer)
            far_from.append(layer)
        kept = sorted(stay)
    order = [layer for layer in (*order, *kept) if layer not in fixed] + list(fixed)
    return [(order.index(layer) + 1) / size for layer in range(size)]


def spaced(units: Units) -> dict[Key, torch.Tensor]:
    """Return the `spacing` of the layers of each list, `[layers]`."""
    return {
        site.key: torch.tensor(spacing(site.size, site.fixed), dtype=torch.float64)
        for site in units
        if site.kind == "layers"
    }


def spaced_layers(model: PreTrainedModel, keep: int) -> Structure:
    """Return the structure that keeps evenly spaced layers, for models trained with LayerDrop.

    `gated(model, spaced_layers(model, 6))` runs the model at that depth without changing it;
    `shrink` removes the layers.

    Args:
        model: The model itself, not a wrapper.
        keep: Number of layers to keep, in all lists together.

    Raises:
        ValueError: The model has no removable layers, or `keep` is out of range.
        UnreachableTargetError: Too many layers cannot be removed.
    """
    units = find_units(model).of(["layers"])
    total = sum(site.size for site in units)
    if not 1 <= keep <= total:
        raise ValueError(f"keep is the number of layers to keep, 1 to {total}; got {keep}")
    target = Target("sparsity", 1.0, {"layers": 1 - keep / total})
    return best_structure(units, spaced(units), target)


def loss_delta(
    model: PreTrainedModel,
    units: Units,
    batches: Sequence[Mapping[str, Any]],
    progress: bool = False,
) -> dict[Key, torch.Tensor]:
    """Score layers by greedy removal: remove the layer that raises the loss least, and repeat.

    After each removal the remaining layers are evaluated again, so that a layer gains importance
    when a redundant neighbour is removed. `n` layers take `n² / 2` evaluations. Under several
    processes all ranks remove the same layers, by the loss over the examples of all ranks.

    Returns:
        The rise of the mean loss at a layer's removal, `[layers]` by list, strictly increasing in
        the order of removal. The last layer of a list, and fixed ones, have the greatest score.
    """
    sites = Units(tuple(site for site in units if site.kind == "layers"))
    closed = {site.path: frozenset[int]() for site in sites}
    order: list[tuple[str, int]] = []
    rises: list[float] = []
    fitted: list[Mapping[str, Any]] = []

    def candidates() -> list[tuple[str, int]]:
        found = []
        for site in sites:
            free = [i for i in site.removable if i not in closed[site.path]]
            found += [(site.path, i) for i in free if len(free) > 1 or site.fixed]
        return found

    total = len(candidates())
    gates = Gates(model, sites)
    with gates, evaluating(model), Progress(disable=not progress, transient=True) as shown:
        task = shown.add_task("removing layers", total=1 + total * (total + 1) // 2)

        def loss_without(path: str, layers: frozenset[int]) -> tuple[float, int]:
            gates.close_layers(sites.site("layers", path), layers)
            loss = _summed_loss(model, fitted, gates)
            gates.close_layers(sites.site("layers", path), closed[path])
            shown.advance(task)
            return loss

        def whole(parts: Iterable[Mapping[str, Any]]) -> tuple[float, int]:
            # No layer is closed yet, so batches that fit now will fit later.
            fitted[:] = parts
            return _summed_loss(model, fitted, gates)

        [loss] = _means([run_within_memory(whole, batches)], ["no layer"])
        shown.advance(task)
        while left := candidates():
            losses = [loss_without(path, closed[path] | {index}) for path, index in left]
            means = _means(losses, [f"{path}.{index}" for path, index in left])
            least = min(range(len(left)), key=means.__getitem__)
            path, index = left[least]
            closed[path] |= {index}
            gates.close_layers(sites.site("layers", path), closed[path])
            order.append(left[least])
            floor = math.nextafter(rises[-1], math.inf) if rises else 0.0
            rises.append(max(means[least] - loss, floor))
            loss = means[least]
            logger.info("without %s.%d the loss is %.4f", path, index, loss)
    most = math.nextafter(rises[-1], math.inf) if rises else 0.0
    scores = {site.key: torch.full((site.size,), most, dtype=torch.float64) for site in sites}
    for (path, index), rise in zip(order, rises, strict=True):
        scores["layers", path][index] = rise
    return scores


@torch.no_grad()
def _summed_loss(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], gates: Gates
) -> tuple[float, int]:
    """Return the sum of the losses over the labelled examples, and their number."""
    total, count = 0.0, 0
    for batch in batches:
        inputs = placed(model, batch)
        labels = inputs.pop("labels", inputs.pop("label", None))
        gates.fired.clear()
        logits = logits_of(model(**inputs))
        gates.check_fired()
        check_finite(model, inputs, logits)
        losses = hard_loss(logits, labels, problem_type(model.config, labels))
        total += losses.double().sum().item()
        count += int(labelled(labels))
    return total, count


def _means(losses: list[tuple[float, int]], names: list[str]) -> list[float]:
    """Return the means over the examples of all ranks, from this rank's sums and counts."""
    sums = {("layers", "loss"): torch.tensor([total for total, _ in losses], dtype=torch.float64)}
    reduced = Scores(sums, losses[0][1]).reduce()  # type: ignore[arg-type]
    if not reduced.count:
        raise UnusableScoresError(
            "no examples were scored: the calibration data is empty, or has no labels"
        )
    means = (next(iter(reduced.sums.values())) / reduced.count).tolist()
    for name, mean in zip(names, means, strict=True):
        if not math.isfinite(mean):
            raise UnusableScoresError.not_finite(f"the loss without {name} is")
    return means
