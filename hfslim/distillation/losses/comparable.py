"""Whether two models compute inside what feature losses can compare: tried on a small input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.utils import logging

from hfslim.distillation.losses.capture import Capture, Seen
from hfslim.distillation.losses.layer_maps import Pairs
from hfslim.measuring.timing import evaluating
from hfslim.pruning.surgery.proof import PROBE_EXAMPLES, probe_inputs

__all__ = ["check_layers", "every_layer_runs", "probed"]

logger = logging.get_logger(__name__)


def probed(captures: tuple[Capture, Capture], head_by_head: bool) -> tuple[Seen, Seen]:
    """Run student and teacher once on random inputs, and return what both computed.

    Args:
        captures: Of the student and of the teacher.
        head_by_head: Whether the last attention's heads are compared one with one.

    Raises:
        ValueError: They are not one by one for the same examples and positions; or the last
            attentions have other numbers of heads.
    """
    result = []
    for capture in captures:
        inputs = probe_inputs(capture.model)
        with capture.recording() as seen, evaluating(capture.model):
            capture.model(**inputs, **capture.arguments)
        # Without a backward pass a model in parts stays whole, and an optimizer would take that.
        for module in capture.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        result.append(seen)
    mine, theirs = result
    _check_positions("hidden states", *(_shapes(seen.hidden, 1) for seen in result))
    _check_positions("attention maps", *(_shapes(seen.attentions, -1) for seen in result))
    _check_positions("queries, keys and values", *(_shapes(seen.vectors, 1) for seen in result))
    if head_by_head:
        heads = [seen.attentions[-1].shape[1] for seen in result]
        if heads[0] != heads[1]:
            raise ValueError(
                f"minilm compares the last attention head by head, and the student has {heads[0]} "
                f"heads there, the teacher {heads[1]}: use minilm_v2, which compares any numbers."
            )
    for capture, seen in zip(captures, result, strict=True):
        if seen.hidden and seen.attentions and len(seen.hidden) != len(seen.attentions):
            raise ValueError(
                f"{capture.name} has {len(seen.hidden)} layers and {len(seen.attentions)} "
                "attention maps, so one layer map cannot pair both: use a loss on hidden states "
                "or on attentions alone."
            )
    return mine, theirs


def check_layers(pairs: Pairs, sizes: Sequence[int]) -> None:
    """Refuse pairs of layers that are not there.

    Args:
        pairs: Of the student's and the teacher's layers.
        sizes: How many there are of each.

    Raises:
        ValueError: A layer is not there.
    """
    for s, t in pairs:
        if s >= sizes[0] or t >= sizes[1]:
            raise ValueError(
                f"layer_map pairs layer {s} of the student with {t} of the teacher; they have "
                f"{sizes[0]} and {sizes[1]}, counted from 0."
            )


@contextmanager
def every_layer_runs(model: nn.Module) -> Iterator[None]:
    """Switch a model's own dropping of layers off inside the block.

    wav2vec2 and its kin skip layers at random in training (`config.layerdrop`, 0.1 as a rule). What
    a skipped layer would have computed cannot be compared. `LayerDropCallback` goes together with
    losses on features.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    holders: list[Any] = [*configs.values(), *model.modules()]
    before = [(one, vars(one)["layerdrop"]) for one in holders if vars(one).get("layerdrop")]
    if before:
        logger.warning(
            f"{type(model).__name__} skips layers at random (layerdrop={before[0][1]:g}), which "
            "feature losses could not compare: it runs them all in this training; for skipped ones "
            "use LayerDropCallback."
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
