"""Record what a model computes inside, while it runs once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hfslim.anatomy.adapters import base_of, plain_twin
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.layer_modules import layer_modules

__all__ = ["Capture", "Seen", "position_mask"]

logger = logging.get_logger(__name__)


@dataclass
class Seen:
    """What one forward pass computed.

    Attributes:
        hidden: Output of each layer, `[batch, positions, features]`.
        attentions: Attention probabilities of each layer that has any, `[batch, heads, positions,
            positions]`.
        vectors: Queries, keys and values of the last attention, each `[batch, positions, heads ·
            head size]`.
    """

    hidden: list[Tensor] = field(default_factory=list)
    attentions: list[Tensor] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)


class Capture:
    """Records hidden states, attentions or the last attention's queries, keys and values.

    Hooks are in the model for the time of one forward pass only, behind all others, so that gates
    have had their say. Wrappers around the model (DDP) do not matter.

    Args:
        model: The model itself.
        hidden: Whether to record the output of each layer.
        attentions: Whether to record attention probabilities; the model then runs with eager
            attention, the only kind that has them, until `release`.
        vectors: Whether to record the last attention's queries, keys and values.

    Attributes:
        layers: The layers, in the order in which they run.

    Raises:
        ValueError: The model has no layers or no attention where they are asked for.
    """

    def __init__(self, model: nn.Module, *, hidden: bool, attentions: bool, vectors: bool) -> None:
        self.model: Any = base_of(model)
        self.name = type(self.model).__name__
        self.layers = layer_modules(self.model) if hidden else []
        self.attentions = attentions
        self.projections, self.heads = _last_projections(self.model) if vectors else ([], 0)
        if hidden and not self.layers:
            raise ValueError(
                f"{self.name} has no layers that hfslim finds, so hidden states cannot be "
                "compared; `hfslim.find_units(model)` lists what it finds."
            )
        self._usual: str | None = None
        if attentions and self.model.config._attn_implementation != "eager":
            logger.warning(
                f"{self.name} runs with eager attention, which alone tells attention probabilities;"
                " hidden-state losses and minilm_v2 go without."
            )
            self._usual = self.model.config._attn_implementation
            self.model.set_attn_implementation("eager")

    def release(self) -> None:
        """Let the model run with the attention that it had."""
        if self._usual is not None:
            self.model.set_attn_implementation(self._usual)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the model's forward has to be given besides its inputs."""
        return {"output_attentions": True, "return_dict": True} if self.attentions else {}

    @contextmanager
    def recording(self) -> Iterator[Seen]:
        """Record one forward pass of the model, run inside the block."""
        seen = Seen()
        handles = [
            layer.register_forward_hook(lambda _, __, out: seen.hidden.append(_states(out)))
            for layer in self.layers
        ]
        handles += [
            module.register_forward_hook(lambda _, __, out: seen.vectors.extend(self._split(out)))
            for module in self.projections
        ]

        def end(_: nn.Module, __: Any, outputs: Any) -> None:
            if self.attentions:
                seen.attentions = [a for a in outputs.get("attentions") or () if a is not None]
            self._check(seen)

        handles.append(self.model.register_forward_hook(end))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _check(self, seen: Seen) -> None:
        if len(seen.hidden) != len(self.layers):
            raise RuntimeError(
                f"{self.name} ran {len(seen.hidden)} of {len(self.layers)} layers as modules, so "
                "their outputs cannot be told apart; use minilm_v2 or losses on logits."
            )
        if self.projections and len(seen.vectors) != 3:
            raise ValueError(
                f"{self.name} does not run the projections of its last attention as modules, so "
                "queries, keys and values are not seen; use a loss on hidden states."
            )
        if self.attentions and not seen.attentions:
            raise ValueError(
                f"{self.name} gives no attention probabilities; use a loss on hidden states, or "
                "minilm_v2."
            )
        if torch.is_grad_enabled() and self.model.training:
            for kind in fields(seen):
                tensors = getattr(seen, kind.name)
                if tensors and not any(x.requires_grad for x in tensors):
                    raise ValueError(
                        f"no gradient reaches the {kind.name} of {self.name}: {self._why_none()}"
                    )

    def _why_none(self) -> str:
        functions = (
            getattr(m, "_gradient_checkpointing_func", None)
            for m in self.model.modules()
            if getattr(m, "gradient_checkpointing", False)
        )
        if any(getattr(f, "keywords", {}).get("use_reentrant") for f in functions):
            return (
                "reentrant gradient checkpointing hides it; set activation_checkpointing_kwargs="
                "{'use_reentrant': False}."
            )
        return "what trains comes behind it; let layers train too, or leave out the feature losses."

    def _split(self, output: Tensor) -> list[Tensor]:
        return list(output.chunk(3, dim=-1)) if len(self.projections) == 1 else [output]


def position_mask(model: Any, inputs: dict[str, Any], positions: int) -> Tensor | None:
    """Tell which positions of the hidden states count: tokens that are no padding, real frames.

    Args:
        model: The model itself, or inside an adapter.
        inputs: Its batch.
        positions: Number of positions of its hidden states.

    Returns:
        `[batch, positions]`, or None where all count.

    Raises:
        ValueError: The batch's mask has another length, and the model does not say how its frames
            follow from it.
    """
    mask = inputs.get("attention_mask", inputs.get("pixel_attention_mask"))
    if mask is None or mask.ndim != 2:
        return None
    if mask.shape[1] == positions:
        return mask
    frames = getattr(base_of(model), "_get_feature_vector_attention_mask", None)
    whole = getattr(base_of(model), "_get_feat_extract_output_lengths", lambda _: positions)
    number = int(whole(torch.tensor(mask.shape[1])))
    squeezed = number // max(positions, 1)  # SEW's layers run on the mean of so many frames.
    if frames is not None and squeezed > 1:
        starts = torch.arange(positions, device=mask.device) * squeezed
        return starts < frames(number, mask).sum(-1, keepdim=True)
    if frames is None or number != positions:
        raise ValueError(
            f"{type(base_of(model)).__name__} turns {mask.shape[1]} positions of the attention "
            f"mask into {positions} hidden states and does not tell which are padding; leave out "
            "the feature losses."
        )
    return frames(positions, mask)


def _states(output: Any) -> Tensor:
    states = output if isinstance(output, Tensor) else output[0]
    return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states


def _last_projections(model: nn.Module) -> tuple[list[nn.Module], int]:
    sites = [site for site in find_units(plain_twin(model)) if site.kind == "heads"]
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no attention whose projections hfslim finds; minilm and "
            "minilm_v2 compare queries, keys and values: use a loss on hidden states."
        )
    last = sites[-1]
    paths = list(
        dict.fromkeys(c.module for c in last.cuts if c.module != last.gate and c.tensor == "weight")
    )
    return [model.get_submodule(path) for path in paths[:3]], last.size
