"""Zeros in a model's weights that stay zero in training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hfslim.anatomy.weights import weight_of
from hfslim.pruning.scores.importance import UnusableScoresError
from hfslim.sparsity.weight_masks import digest
from hfslim.training.ranks import from_all_ranks

logger = logging.getLogger(__name__)

KeptIndices = Mapping[str, Mapping[int, torch.Tensor]]
"""By path of a weight and by dimension, the indices that gates keep."""


class HeldZeros:
    """The zeros of a model's weights: initially those that it has.

    The gradient of a held weight is zero, also for clipping, its floating point state in the
    optimizer is zero, and it is set to zero after each step. Only gradient hooks are added to the
    model; no key of its `state_dict` changes.

    Attributes:
        weights: The modules, by their paths before any cut.
        zeros: The weights that are held at zero, by path, bool, in the shape before any cut.
        kept: The part of the weights that gates keep; zeros elsewhere do not count.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Module]) -> None:
        self.model = model
        self.weights = dict(weights)
        self.kept: KeptIndices = {}
        self.zeros: dict[str, torch.Tensor] = {}
        for path, module in self.weights.items():
            weight = weight_of(module).detach()
            if not torch.isfinite(weight).all():
                raise UnusableScoresError(f"the weight of {path!r} is not finite")
            self.zeros[path] = weight == 0
        self._handles: list[Any] = []

    @property
    def fraction(self) -> float:
        """Fraction of held weights among those that gates keep."""
        parts = [self.part(path, zeros) for path, zeros in self.zeros.items()]
        held = sum(int(part.sum()) for part in parts)
        return held / max(sum(part.numel() for part in parts), 1)

    def part(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part that gates keep of a tensor in the shape of a weight."""
        if tensor.shape == self.zeros[path].shape:
            for dim, index in self.kept.get(path, {}).items():
                tensor = tensor.index_select(dim, index.to(tensor.device))
        return tensor

    def add(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Hold more zeros, given for the part that gates keep."""
        _check_equal_on_all_ranks(digest(parts))
        for path, part in parts.items():
            zeros = self.zeros[path]
            where = [torch.arange(size, device=zeros.device) for size in zeros.shape[:2]]
            for dim, index in self.kept.get(path, {}).items():
                where[dim] = index.to(zeros.device)
            zeros[where[0][:, None], where[1]] |= part

    def attach(self) -> None:
        """Register the gradient hooks."""
        self._detach_leftovers()
        for path, module in self.weights.items():
            weight = weight_of(module)
            if weight.requires_grad:
                self._handles.append(weight.register_hook(_GradientHook(self, path)))

    def detach(self) -> None:
        """Remove the gradient hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def apply(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Set held weights to zero, and their state in an optimizer."""
        for path, module in self.weights.items():
            weight, zeros = weight_of(module), self.zeros[path]
            weight.masked_fill_(zeros if weight.shape == zeros.shape else self.part(path, zeros), 0)
            for value in optimizer.state.get(weight, {}).values() if optimizer else ():
                if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                    if value.is_floating_point():
                        value.masked_fill_(zeros, 0)

    def state(self) -> dict[str, Any]:
        """Return the state from which, with the weights, `restore` finds the zeros."""
        live = {
            path: ((weight_of(module) == 0) & ~self.zeros[path]).flatten().nonzero().flatten()
            for path, module in self.weights.items()
        }
        return {
            "digest": digest(self.zeros),
            "live_zeros": {path: index.tolist() for path, index in live.items() if len(index)},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Hold the zeros of a saved state, whose weights have been loaded."""
        for path, index in state["live_zeros"].items():
            self.zeros[path].view(-1)[index] = False
        if digest(self.zeros) != state["digest"]:
            raise ValueError(
                "the model does not have the zeros of the checkpoint, so its weights were not "
                "loaded: the stock Trainer cannot read its own checkpoints for families whose key "
                "names differ on the Hub; use SlimTrainer"
            )

    def _detach_leftovers(self) -> None:
        """Remove the hooks that an interrupted run left on the model."""
        for parameter in self.model.parameters():
            for hook in list((parameter._backward_hooks or {}).values()):
                if isinstance(hook, _GradientHook) and hook.owner._handles:
                    logger.warning("removing the hooks that an interrupted training left")
                    hook.owner.detach()


class _GradientHook:
    """Sets the gradient of held weights to zero."""

    def __init__(self, owner: HeldZeros, path: str) -> None:
        self.owner, self.path = owner, path

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.masked_fill(self.owner.zeros[self.path], 0)


def _check_equal_on_all_ranks(found: str) -> None:
    all_found = from_all_ranks(found)
    if len(set(all_found)) > 1:
        raise RuntimeError(
            f"the processes remove other weights ({all_found}): their weights have diverged"
        )
