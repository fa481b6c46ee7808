"""Transfer learning: train the head only, LoRA, gradual unfreezing and the L2-SP penalty."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from hfslim.anatomy.adapters import base_of
from hfslim.anatomy.layer_modules import layer_modules
from hfslim.anatomy.weights import sparse_modules
from hfslim.training.callback_requirements import check_whole_parameters
from hfslim.training.log_figures import FiguresCallback

__all__ = ["L2SP", "GradualUnfreezing", "head_modules", "train_head_only", "with_lora"]

logger = logging.get_logger(__name__)


def head_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of a classifier's modules outside of its encoder.

    Raises:
        ValueError: The model does not separate its head from its encoder.
    """
    body: list[nn.Module] = [model.base_model] if model.base_model is not model else []
    layers = [] if body else layer_modules(model)
    names = []
    for name, child in model.named_children():
        inside = set(child.modules())
        if not inside & set(body or layers) and any(True for _ in child.parameters()):
            names.append(name)
    if not names or len(names) == len(list(model.named_children())):
        raise ValueError(
            f"{type(model).__name__} does not separate its head from its encoder: freeze "
            "parameters by requires_grad yourself, and train in full."
        )
    return names


def train_head_only(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze all of a classifier but its head, in place, and return it.

    Raises:
        ValueError: The model does not separate its head from its encoder.
    """
    head = _head_prefixes(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(head))
    logger.info(f"only the head trains: {', '.join(head_modules(model))}")
    return model


def with_lora(model: PreTrainedModel, rank: int) -> Any:
    """Add LoRA to every linear map inside a classifier's layers; its head trains in full.

    Args:
        model: The classifier, which is changed.
        rank: Rank of the adapters; their scale is 2.

    Returns:
        A `peft.PeftModel`; `hfslim.merge_adapters` turns it back into a plain model.

    Raises:
        ValueError: No layers or no head are found, or weights are sparse: the adapters would fill
            their zeros when they are merged.

    References:
        Hu et al., LoRA, 2021, arXiv:2106.09685.
    """
    from peft import LoraConfig, get_peft_model

    sparse = sparse_modules(model)
    if sparse:
        raise ValueError(
            f"{len(sparse)} weights of {type(model).__name__} are sparse, such as {sparse[0]!r}, "
            "and adapters that are folded in would fill their zeros: train without lora_rank, "
            "which holds them."
        )
    inside = {module for layer in layer_modules(model) for module in layer.modules()}
    targets = [n for n, m in model.named_modules() if m in inside and isinstance(m, nn.Linear)]
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no layers with linear maps that hfslim finds: use peft "
            "yourself and name the modules to adapt, or train in full."
        )
    logger.info(f"LoRA of rank {rank} on {len(targets)} linear maps")
    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=head_modules(model)
    )
    return get_peft_model(model, settings)


class GradualUnfreezing(TrainerCallback):
    """Unfreezes a classifier's layers one after another, from the head down.

    The head and the modules after the last layer train from the first step, then the last layer,
    at the end the embeddings. Frozen parameters have no gradient in the optimizer step and in the
    gradient norm. The backward pass still computes it: every wrapper works, and no time is saved.

    Args:
        until: Fraction of the steps after which all parameters train, above 0 and up to 1.

    Raises:
        ValueError: `until` is out of range; or, when training begins, parameters are sharded.

    References:
        Howard and Ruder, Universal Language Model Fine-tuning, 2018, arXiv:1801.06146.
    """

    def __init__(self, until: float = 0.5) -> None:
        if not 0 < until <= 1:
            raise ValueError(f"until is {until}; expected a share of the steps, above 0, up to 1.")
        self.until = until
        self.groups: list[list[nn.Parameter]] = []
        self.open = 0
        self._handles: list[Any] = []

    def on_train_begin(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any, **__: Any
    ) -> None:
        """Find the layers, and mask the gradients of the frozen ones."""
        check_whole_parameters(args, type(self).__name__)
        self.groups = _from_the_head_down(base_of(model))
        closed = {p: depth for depth, group in enumerate(self.groups) for p in group}
        for parameter, depth in closed.items():
            self._handles.append(parameter.register_hook(self._masked(depth)))

    def _masked(self, depth: int) -> Any:
        return lambda gradient: None if depth < self.open else torch.zeros_like(gradient)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        """Set the number of groups that train in this step."""
        progress = state.global_step / (max(state.max_steps, 1) * self.until)
        # 1e-9 keeps a step exactly on a boundary from being rounded below it.
        opened = 1 + math.floor(min(progress, 1.0) * (len(self.groups) - 1) + 1e-9)
        if opened != self.open:
            logger.info(f"step {state.global_step}: {opened} of {len(self.groups)} groups train")
        self.open = opened

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Keep the optimizer, and so its weight decay, away from frozen parameters."""
        for group in self.groups[self.open :]:
            for parameter in group:
                parameter.grad = None

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.open = [], 0


class L2SP(FiguresCallback):
    """Adds the starting-point penalty `strength/2 · ‖w − w₀‖² + head/2 · ‖v‖²` to the loss.

    w are the encoder's weights, w₀ their values when the Trainer was made, v the head's weights.
    The gradient is added to that of the loss before each optimizer step, after clipping. The value
    is logged as `loss_l2_sp` and is no part of `loss`. Set `weight_decay` to 0: it pulls to 0.

    Args:
        strength: Factor for the encoder; 0.001 to 1 in the paper.
        head: Factor for the head.

    Raises:
        ValueError: A factor is below 0, both are 0, parameters are sharded, or the gradients are
            scaled, as in fp16.

    References:
        Li et al., Explicit Inductive Bias for Transfer Learning, 2018, arXiv:1802.01483.
    """

    def __init__(self, strength: float = 0.01, head: float = 0.01) -> None:
        if min(strength, head) < 0 or strength == head == 0 or not math.isfinite(strength + head):
            raise ValueError(f"strength {strength} and head {head} must be from 0 on, not both 0.")
        self.strength, self.head = strength, head
        self._start: dict[str, torch.Tensor] = {}
        self._head: tuple[str, ...] = ()
        self._value = torch.zeros(())

    def on_init_end(  # type: ignore[override]
        self, args: TrainingArguments, *_: Any, model: Any, **__: Any
    ) -> None:
        """Keep the starting point, before any checkpoint is read."""
        self._head = _head_prefixes(model)
        self._start = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not name.startswith(self._head)
        }

    def on_train_begin(  # type: ignore[override]
        self, args: TrainingArguments, *_: Any, model: Any, **__: Any
    ) -> None:
        """Refuse a training that would distort the penalty."""
        check_whole_parameters(args, type(self).__name__)
        if AcceleratorState().mixed_precision == "fp16":
            raise ValueError("fp16 scales gradients, which L2SP adds to: train with bf16=True.")
        if args.weight_decay:
            logger.warning(
                f"weight_decay {args.weight_decay:g} pulls weights to 0, against L2SP: set it to 0"
            )

    def on_pre_optimizer_step(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any,
        **_: Any,
    ) -> None:
        """Add the gradient of the penalty."""
        value = torch.zeros((), device=args.device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.grad is None:
                    continue
                head = name.startswith(self._head)
                factor = self.head if head else self.strength
                moved = parameter if head else parameter - self._start[name].to(parameter.device)
                parameter.grad.add_(moved, alpha=factor)
                value += factor / 2 * moved.float().square().sum()
        self._value = value

    def figures(self) -> dict[str, float]:
        """Return the penalty of the last step."""
        return {"loss_l2_sp": float(self._value)}


def _head_prefixes(model: PreTrainedModel) -> tuple[str, ...]:
    return tuple(f"{name}." for name in head_modules(model))


def _from_the_head_down(model: PreTrainedModel) -> list[list[nn.Parameter]]:
    layers = [set(layer.parameters()) for layer in layer_modules(model)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers that hfslim finds, so they cannot begin to "
            "train one by one; train in full."
        )
    head = _head_prefixes(model)
    groups: list[list[nn.Parameter]] = [[] for _ in range(len(layers) + 2)]
    top, bottom = 0, len(layers) + 1
    passed = False
    for name, parameter in model.named_parameters():
        inside = next((i for i, layer in enumerate(layers) if parameter in layer), None)
        passed = passed or inside is not None
        if not parameter.requires_grad:
            continue
        if inside is not None:
            groups[len(layers) - inside].append(parameter)
        else:
            groups[top if passed or name.startswith(head) else bottom].append(parameter)
    return [group for group in groups if group]
