"""Run a model on tensors without contents, to see which of its features meet."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfslim.anatomy.axes import Axes
from hfslim.anatomy.following import Follower, Labels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trace:
    """What a model's forward pass does with its features.

    Attributes:
        axes: Which go together.
        labels: What lies along each dimension of each parameter and buffer.
        makers: Parameters in the order in which they make features along their first dimension.
        takers: Parameters that take features along their second, and the dimension of the
            module's input that these lie in.
    """

    axes: Axes
    labels: Mapping[str, Labels]
    makers: Sequence[str]
    takers: Sequence[tuple[str, int]]


def trace(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Trace:
    """Run a model on tensors without contents, and note which features meet.

    A model that looks into its tensors as it runs (SEW-D) runs on its weights and its inputs.

    Args:
        model: The model; neither it nor its weights are touched.
        inputs: Arguments of its forward.

    Returns:
        What was seen.

    Raises:
        Exception: The model cannot run.
    """
    tensors = (*model.parameters(), *model.buffers())
    try:
        empty = {id(tensor): _emptied(tensor) for tensor in tensors}
        return _follow(model, empty, {name: value.to("meta") for name, value in inputs.items()})
    except Exception as error:
        logger.debug("cannot run without contents", exc_info=error)
        return _follow(model, {id(tensor): tensor for tensor in tensors}, inputs)


def _emptied(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty


def _follow(
    model: nn.Module, tensors: dict[int, torch.Tensor], inputs: Mapping[str, torch.Tensor]
) -> Trace:
    """Follow the features of a copy that has other tensors, by the ids of the model's own."""
    double = copy.deepcopy(model, dict[int, Any](tensors)).eval()
    for module in double.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    follower = Follower(double)
    with torch.no_grad(), follower:
        logits = double(**inputs)[0]
    follower.axes.bind(follower.labels(logits), "they are the model's output")
    named = {name: follower.labels(tensor) for name, tensor in follower.tensors.items()}
    return Trace(follower.axes, named, tuple(follower.makers), follower.takers)
