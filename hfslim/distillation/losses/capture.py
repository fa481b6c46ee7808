"""Record a model's hidden states and attention during one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hfslim.anatomy.adapters import base_of, plain_twin
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.layer_modules import layer_modules

__all__ = ["Capture", "CapturedStates", "Packing", "position_mask"]

logger = logging.get_logger(__name__)


@dataclass
class CapturedStates:
    """The hidden states and attention of one forward pass.

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

    Hooks are registered for one forward pass, after all others, so that gates are applied first.
    Wrappers around the model (DDP) may stay.

    Args:
        model: The model, not wrapped.
        hidden: Whether to record the output of each layer.
        attentions: Whether to record attention probabilities; until `release` the model then runs
            with eager attention, the only kind that returns them.
        vectors: Whether to record the last attention's queries, keys and values.

    Attributes:
        layers: The layers, in the order in which they run.

    Raises:
        ValueError: The model has no layers or no attention to record.
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
                f"{self.name} runs with eager attention, which alone returns attention "
                "probabilities; hidden-state losses and minilm_v2 do not need it."
            )
            self._usual = self.model.config._attn_implementation
            self.model.set_attn_implementation("eager")

    def release(self) -> None:
        """Restore the model's attention implementation."""
        if self._usual is not None:
            self.model.set_attn_implementation(self._usual)

    @property
    def arguments(self) -> dict[str, Any]:
        """Further arguments of the model's forward."""
        return {"output_attentions": True, "return_dict": True} if self.attentions else {}

    @contextmanager
    def recording(self) -> Iterator[CapturedStates]:
        """Record one forward pass that is run inside the block."""
        states = CapturedStates()
        handles = [
            layer.register_forward_hook(lambda _, __, out: states.hidden.append(_states(out)))
            for layer in self.layers
        ]
        handles += [
            module.register_forward_hook(lambda _, __, out: states.vectors.extend(self._split(out)))
            for module in self.projections
        ]

        def end(_: nn.Module, __: Any, outputs: Any) -> None:
            if self.attentions:
                states.attentions = [a for a in outputs.get("attentions") or () if a is not None]
            self._check(states)

        handles.append(self.model.register_forward_hook(end))
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    def _check(self, states: CapturedStates) -> None:
        if len(states.hidden) != len(self.layers):
            raise RuntimeError(
                f"{self.name} ran {len(states.hidden)} of {len(self.layers)} layers as modules, so "
                "their outputs are not known layer by layer; use minilm_v2 or losses on logits."
            )
        if self.projections and len(states.vectors) != 3:
            raise ValueError(
                f"{self.name} does not run the projections of its last attention as modules, so "
                "queries, keys and values cannot be recorded; use a loss on hidden states."
            )
        if self.attentions and not states.attentions:
            raise ValueError(
                f"{self.name} gives no attention probabilities; use a loss on hidden states, or "
                "minilm_v2."
            )
        if torch.is_grad_enabled() and self.model.training:
            for kind in fields(states):
                tensors = getattr(states, kind.name)
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
                "reentrant gradient checkpointing detaches it; set activation_checkpointing_kwargs="
                "{'use_reentrant': False}."
            )
        return "only later modules train; let layers train too, or leave out the feature losses."

    def _split(self, output: Tensor) -> list[Tensor]:
        return list(output.chunk(3, dim=-1)) if len(self.projections) == 1 else [output]


class Packing:
    """Concatenates some layers' hidden states and the last attention's vectors, and splits them.

    Args:
        layers: Numbers of the layers to keep.
        probe: The teacher's states on any input, which give the widths.
    """

    def __init__(self, layers: Sequence[int], probe: CapturedStates) -> None:
        self.layers = list(layers)
        self._number = len(probe.hidden)
        self._hidden = [probe.hidden[t].shape[-1] for t in self.layers]
        self._vectors = [v.shape[-1] for v in probe.vectors]

    def __str__(self) -> str:
        return f"layers {self.layers}, {len(self._vectors)} vectors of the last attention"

    def pack(self, states: CapturedStates) -> Tensor:
        """Return `[batch, positions, features]` float32."""
        hidden = [states.hidden[t] for t in self.layers]
        return torch.cat([x.float() for x in (*hidden, *states.vectors)], -1)

    def unpack(self, packed: Tensor) -> CapturedStates:
        """Return the states that were packed; layers that are not kept get empty tensors."""
        parts = packed.split([*self._hidden, *self._vectors], -1)
        kept = dict(zip(self.layers, parts, strict=False))
        empty = packed.new_empty(0)
        hidden = [kept.get(t, empty) for t in range(self._number)]
        return CapturedStates(hidden=hidden, vectors=list(parts[len(self.layers) :]))


def position_mask(model: Any, inputs: dict[str, Any], positions: int) -> Tensor | None:
    """Return the mask of the positions of the hidden states that are not padding.

    Args:
        model: The model, or an adapter around it.
        inputs: Its batch.
        positions: Number of positions of its hidden states.

    Returns:
        `[batch, positions]`, or None where all count.

    Raises:
        ValueError: The batch's mask has another length, and the model has no method that converts
            it to frames.
    """
    mask = inputs.get("attention_mask", inputs.get("pixel_attention_mask"))
    if mask is None or mask.ndim != 2:
        return None
    if mask.shape[1] == positions:
        return mask
    frames = getattr(base_of(model), "_get_feature_vector_attention_mask", None)
    whole = getattr(base_of(model), "_get_feat_extract_output_lengths", lambda _: positions)
    number = int(whole(torch.tensor(mask.shape[1])))
    squeezed = number // max(positions, 1)  # SEW averages so many frames.
    if frames is not None and squeezed > 1:
        starts = torch.arange(positions, device=mask.device) * squeezed
        return starts < frames(number, mask).sum(-1, keepdim=True)
    if frames is None or number != positions:
        raise ValueError(
            f"{type(base_of(model)).__name__} turns {mask.shape[1]} positions of the attention "
            f"mask into {positions} hidden states and has no method that marks the padding; leave "
            "out the feature losses."
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
