"""Check on a small input that feature losses can compare two models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.utils import logging

from hfslim.distillation.losses.capture import Capture, CapturedStates
from hfslim.measuring.timing import evaluating
from hfslim.pruning.surgery.proof import PROBE_EXAMPLES, probe_inputs

__all__ = ["every_layer_runs", "probe"]

logger = logging.get_logger(__name__)


def probe(
    captures: tuple[Capture, Capture], head_by_head: bool
) -> tuple[CapturedStates, CapturedStates]:
    """Run student and teacher once on random inputs and return their states.

    Args:
        captures: Of the student and of the teacher.
        head_by_head: Whether the heads of the last attention are compared one by one.

    Raises:
        ValueError: The states differ in examples or positions, or the last attentions in their
            number of heads.
    """
    result = []
    for capture in captures:
        inputs = probe_inputs(capture.model)
        with capture.recording() as states, evaluating(capture.model):
            capture.model(**inputs, **capture.arguments)
        # Without a backward pass FSDP leaves the weights gathered, and an optimizer would see them.
        for module in capture.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        result.append(states)
    _check_positions("hidden states", *(_shapes(states.hidden, 1) for states in result))
    _check_positions("attention maps", *(_shapes(states.attentions, -1) for states in result))
    _check_positions("queries, keys and values", *(_shapes(states.vectors, 1) for states in result))
    if head_by_head:
        heads = [states.attentions[-1].shape[1] for states in result]
        if heads[0] != heads[1]:
            raise ValueError(
                f"minilm compares the last attention head by head, and the student has {heads[0]} "
                f"heads there, the teacher {heads[1]}: use minilm_v2, which compares any numbers."
            )
    for capture, states in zip(captures, result, strict=True):
        if states.hidden and states.attentions and len(states.hidden) != len(states.attentions):
            raise ValueError(
                f"{capture.name} has {len(states.hidden)} layers and {len(states.attentions)} "
                "attention maps, so one layer map cannot pair both: use a loss on hidden states "
                "or on attentions alone."
            )
    return result[0], result[1]


@contextmanager
def every_layer_runs(model: nn.Module) -> Iterator[None]:
    """Disable a model's own layer dropout inside the block.

    wav2vec2 and related models skip layers at random in training (`config.layerdrop`, usually 0.1).
    A skipped layer has no output to compare. `LayerDropCallback` works with feature losses.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    holders: list[Any] = [*configs.values(), *model.modules()]
    before = [(one, vars(one)["layerdrop"]) for one in holders if vars(one).get("layerdrop")]
    if before:
        logger.warning(
            f"{type(model).__name__} skips layers at random (layerdrop={before[0][1]:g}), which "
            "feature losses cannot compare: all layers run in this training; to skip layers use "
            "LayerDropCallback."
        )
    for one, _ in before:
        one.layerdrop = 0.0
    try:
        yield
    finally:
        for one, value in before:
            one.layerdrop = value


def _shapes(tensors: Iterable[Tensor], axis: int) -> set[tuple[int, int]]:
    return {(x.shape[0], x.shape[axis]) for x in tensors}


def _check_positions(what: str, mine: set[tuple[int, int]], theirs: set[tuple[int, int]]) -> None:
    if mine != theirs or len(mine) > 1 or any(examples != PROBE_EXAMPLES for examples, _ in mine):
        raise ValueError(
            f"The {what} of student and teacher have {mine} and {theirs} examples and positions "
            f"for the same {PROBE_EXAMPLES} examples, so they cannot be compared one by one; use "
            "losses on logits."
        )
