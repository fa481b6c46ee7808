"""Run a model on tensors without contents, to find the features that go together."""

from __future__ import annotations

import copy
import functools
import logging
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfslim.anatomy.axes import Axes
from hfslim.anatomy.features import Labels
from hfslim.anatomy.following import Follower
from hfslim.anatomy.slices import Cut, Feed
from hfslim.anatomy.structure import Kind
from hfslim.anatomy.units import Refusal, Site

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TAKERS = (*CONVOLUTIONS, nn.Linear, Conv1D)
"""Modules whose inputs are known to be weighed feature by feature."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trace:
    """The features that meet in a model's forward pass.

    Attributes:
        axes: The axes of features, tied where they can only go together.
        labels: The features along each dimension of each parameter and buffer.
        makers: Parameters that make features along their first dimension, in the order of the pass.
        takers: Parameters that take features, with the dimensions of the module's input and of the
            parameter that these lie along.
        norms: The norms that were followed as a whole, in the order of the pass.
    """

    axes: Axes
    labels: Mapping[str, Labels]
    makers: Sequence[str]
    takers: Sequence[tuple[str, int, int]]
    norms: Sequence[str] = ()

    def places(self) -> dict[int, list[Cut]]:
        """Return the places of the units of each group of tied axes."""
        places: dict[int, list[Cut]] = {}
        for name, labels in self.labels.items():
            module, _, tensor = name.rpartition(".")
            for dim, label in enumerate(labels):
                start = 0
                for one in self.axes.resolve(label) or ():
                    group, entries = self.axes.units(one.axis)
                    cut = Cut(module, tensor, dim, (entries * one.inner,), start)
                    places.setdefault(group, []).append(cut)
                    start += self.axes.size(one.axis) * one.inner
        return places

    def feeds(self, cuts: Iterable[Cut]) -> tuple[Feed, ...]:
        """Return the inputs that carry the units of some cuts."""
        found: dict[tuple[str, int], list[Cut]] = {}
        for cut in cuts:
            found.setdefault((f"{cut.module}.{cut.tensor}", cut.dim), []).append(cut)
        return tuple(
            Feed(cut.module, dim, cut.start, cut.widths[0])
            for name, dim, along in self.takers
            for cut in found.get((name, along), ())
        )


Find = Callable[[PreTrainedModel], Iterable[Site | Refusal]]


def by_tracing(kind: Kind) -> Callable[[Find], Find]:
    """Let a function that traces a model refuse its units where the trace fails.

    Its result is kept until the shapes of the model change.
    """

    def wrapped(find: Find) -> Find:
        seen: weakref.WeakKeyDictionary[nn.Module, tuple[Any, list[Site | Refusal]]]
        seen = weakref.WeakKeyDictionary()

        @functools.wraps(find)
        def found(model: PreTrainedModel) -> list[Site | Refusal]:
            shapes = tuple((name, tuple(t.shape)) for name, t in model.state_dict().items())
            if model not in seen or seen[model][0] != shapes:
                try:
                    seen[model] = shapes, list(find(model))
                except Exception as error:
                    logger.debug("no %s", kind, exc_info=error)
                    reason = f"the model cannot be traced: {type(error).__name__}: {error}"
                    seen[model] = shapes, [Refusal(kind, "", reason[:200])]
            return seen[model][1]

        return found

    return wrapped


def why_not(model: nn.Module, cuts: Iterable[Cut], feeds: Iterable[Feed]) -> str:
    """Return why units with these places cannot go; empty if they can."""
    for cut in cuts:
        if cut.tensor in model.get_submodule(cut.module)._non_persistent_buffers_set:
            return f"{cut.module}.{cut.tensor} depends on them and is not saved"
    for feed in feeds:
        if not isinstance(model.get_submodule(feed.module), TAKERS):
            return f"{feed.module!r} takes them and is no known module"
    return ""


def trace(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], norms: Collection[str] = ()
) -> Trace:
    """Run a model on tensors without contents, and note which features meet.

    A model that reads values as it runs (SEW-D) runs on its weights and inputs instead.

    Args:
        model: The model, which does not change.
        inputs: Arguments of its forward.
        norms: Paths of norms across the last dimension, which leave features in their places; any
            other norm binds the features that it runs across.

    Raises:
        Exception: The model cannot run.
    """
    tensors = (*model.parameters(), *model.buffers())
    try:
        empty = {id(t): _emptied(t) for t in tensors}
        hollow = {name: value.to("meta") for name, value in inputs.items()}
        return _follow(model, empty, hollow, norms)
    except Exception as error:
        logger.debug("cannot run without contents", exc_info=error)
        return _follow(model, {id(tensor): tensor for tensor in tensors}, inputs, norms)


def _emptied(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty


def _follow(
    model: nn.Module,
    tensors: dict[int, torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
    norms: Collection[str],
) -> Trace:
    """Follow the features of a copy of the model whose tensors are replaced, by their ids."""
    double = copy.deepcopy(model, dict[int, Any](tensors)).eval()
    for module in double.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    if isinstance(double, PreTrainedModel) and double.config._attn_implementation == "sdpa":
        # sdpa reads the values of masks, which have no contents.
        double.set_attn_implementation("eager")
    follower = Follower(double)
    for path in norms:
        norm = double.get_submodule(path)
        norm.register_forward_pre_hook(follower.enter_norm)
        norm.register_forward_hook(functools.partial(follower.leave_norm, path))
    with torch.no_grad(), follower:
        logits = getattr(double(**inputs), "logits", None)
    if logits is None:
        raise ValueError("its output has no logits, by which cuts are checked")
    features = follower.features
    features.bind(logits, "they are the model's output")
    named = {name: features.labels(tensor) for name, tensor in features.tensors.items()}
    makers, ran = tuple(features.makers), tuple(follower.norms)
    return Trace(features.axes, named, makers, tuple(features.takers), ran)
