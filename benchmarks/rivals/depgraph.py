"""Torch-Pruning on transformers classifiers: the settings of its examples, at a budget of MACs.

Fang et al., DepGraph: Towards Any Structural Pruning, 2023, arXiv:2301.12900; isomorphic groups:
Fang et al., Isomorphic Pruning for Vision Models, 2024, arXiv:2407.04616.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from transformers import PreTrainedModel

import hfslim
from benchmarks.rivals.problem import Cut, Problem
from hfslim.anatomy import families

SCOPES: Mapping[str, Mapping[str, bool]] = {
    "uniform": {"global_pruning": False},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
}
CRITERIA = ("taylor", "hessian", "magnitude")
BISECTIONS = 8


class AccumulatedHessian(tp.importance.GroupHessianImportance):
    """Squared gradients averaged over all examples, as the library documents.

    Release 1.6.1 looks its sums up by name and stores them by tensor, so that the last example
    alone would count.
    """

    def accumulate_grad(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                square = parameter.grad.detach() ** 2
                self._accu_grad[parameter] = self._accu_grad.get(parameter, 0) + square
                self._counter[parameter] = self._counter.get(parameter, 0) + 1

    def fill_gradients(self) -> None:
        """Put the averages where the gradients were, from which the library reads them."""
        for parameter, total in self._accu_grad.items():
            parameter.grad = total / self._counter[parameter]
        self.zero_grad()


@dataclass(frozen=True)
class Attention:
    """An attention module with its projections and the sizes it had before the cut."""

    module: nn.Module
    projections: tuple[Any, ...]
    heads: int
    head_size: int

    def adopt(self, whole_heads: bool) -> None:
        """Tell the module its new sizes, as the library's examples do by hand."""
        width = self.projections[0].out_features
        head_size = self.head_size if whole_heads else width // self.heads
        sizes = dict.fromkeys(families.HEAD_DIM, head_size)
        sizes |= dict.fromkeys(families.QUERY_HEAD_COUNTS, width // head_size)
        sizes |= dict.fromkeys(families.ALL_HEADS_SIZE, width)
        for name, size in sizes.items():
            if name in vars(self.module):
                setattr(self.module, name, size)


def settings() -> dict[str, Cut]:
    """Every combination of criterion, scope, what attention loses, and whether layers stay wide."""
    return {
        ", ".join((criterion, scope, attention, width)): partial(
            cut,
            criterion=criterion,
            scope=scope,
            whole_heads=attention == "heads",
            inside=width == "inside layers",
        )
        for criterion, scope, attention, width in product(
            CRITERIA, SCOPES, ("heads", "head sizes"), ("inside layers", "hidden size")
        )
    }


def cut(
    problem: Problem, budget: float, criterion: str, scope: str, whole_heads: bool, inside: bool
) -> PreTrainedModel:
    """Prune at the smallest ratio that meets the budget, found by bisection.

    Args:
        problem: What there is to cut with.
        budget: Fraction of the multiply-accumulates to keep.
        criterion: One of `CRITERIA`.
        scope: A key of `SCOPES`.
        whole_heads: Whether attention loses heads; if not, every head of a layer gets thinner.
        inside: Whether the hidden size stays, so that heads and neurons alone go.
    """
    scored = score_weights(problem, criterion)
    low, high, best = 0.0, 1.0, None
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        model = scored.model()
        _prune(model, problem, scored.importance, scope, ratio, whole_heads, inside)
        if problem.kept(model) <= budget:
            high, best = ratio, model
        else:
            low = ratio
    if best is None:
        raise ValueError(f"no ratio below {high:.3f} keeps {budget:g} of the MACs or less")
    return best


@dataclass(frozen=True)
class Scored:
    """The teacher, the library's importance for it, and the gradients that this reads."""

    teacher: PreTrainedModel
    importance: Any
    gradients: tuple[torch.Tensor | None, ...]

    def model(self) -> PreTrainedModel:
        """Return a copy of the teacher with the gradients on it."""
        model = _traceable(self.teacher)
        for parameter, gradient in zip(model.parameters(), self.gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        return model


@lru_cache(maxsize=3)
def score_weights(problem: Problem, criterion: str) -> Scored:
    """Compute what a criterion needs, from all calibration examples."""
    model = _traceable(problem.teacher).eval()
    if criterion == "magnitude":
        importance = tp.importance.GroupMagnitudeImportance()
    elif criterion == "taylor":
        importance = tp.importance.GroupTaylorImportance()
        for batch in problem.calibration:
            model(**batch).loss.backward()
    else:
        importance = AccumulatedHessian()
        for batch in problem.calibration:
            for row in range(len(batch["labels"])):
                model.zero_grad()
                example = {name: value[row : row + 1] for name, value in batch.items()}
                model(**example).loss.backward()
                importance.accumulate_grad(model)
        importance.fill_gradients()
    return Scored(problem.teacher, importance, tuple(p.grad for p in model.parameters()))


def _traceable(teacher: PreTrainedModel) -> PreTrainedModel:
    # The tracer follows autograd: a frozen table would be missed and keep its width.
    return copy.deepcopy(teacher).requires_grad_(True)


def _prune(
    model: PreTrainedModel,
    problem: Problem,
    importance: Any,
    scope: str,
    ratio: float,
    whole_heads: bool,
    inside: bool,
) -> None:
    attentions = list(_attentions(model))
    heads = {projection: a.heads for a in attentions for projection in a.projections}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model.eval(),
            dict(problem.inputs),
            importance=importance,
            pruning_ratio=ratio,
            head_pruning_ratio=ratio,
            prune_num_heads=whole_heads,
            prune_head_dims=not whole_heads,
            num_heads=heads,
            ignored_layers=list(_ignored(model, problem, inside)),
            output_transform=lambda output: output.logits.sum(),
            **SCOPES[scope],
        )
        for group in pruner.step(interactive=True):
            group.prune()
    for attention in attentions:
        attention.adopt(whole_heads)
    model.zero_grad()


def _attentions(model: PreTrainedModel) -> Iterator[Attention]:
    for site in hfslim.find_units(model):
        if site.kind != "heads":
            continue
        paths = dict.fromkeys(cut.module for cut in site.cuts if cut.module != site.gate)
        projections = tuple(model.get_submodule(path) for path in paths)
        yield Attention(model.get_submodule(site.path), projections, site.size, site.width)


def _ignored(model: PreTrainedModel, problem: Problem, inside: bool) -> Iterator[nn.Module]:
    """Modules whose outputs keep their size: logits; if asked, all along the residual stream."""
    within = set()
    for site in problem.units:
        makers = {cut.module for cut in site.cuts if cut.dim == 0} - {site.gate}
        # Channels along the residual stream come from all that is added to it.
        convolutions = [m for m in makers if isinstance(model.get_submodule(m), nn.Conv2d)]
        if site.kind != "channels" or len(convolutions) == 1:
            within |= makers
    for path, module in model.named_modules():
        widths = isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd)
        if path == "classifier" or (inside and widths and path not in within):
            yield module
