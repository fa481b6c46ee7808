"""Find the dimensions of a model's residual stream that can be removed exactly."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from hfslim.anatomy import families
from hfslim.anatomy.axes import Segment
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.slices import Cut, Feed
from hfslim.anatomy.tracing import Trace, by_tracing, trace, why_not
from hfslim.anatomy.units import Refusal, Site

logger = logging.getLogger(__name__)

LENGTH = {"input_ids": 16}
"""Length of the inputs that are followed, where a short one does."""


def find_dimensions(model: nn.Module, others: Sequence[Site]) -> list[Site | Refusal]:
    """Find the widths that norms run across, and those that a config sets equal to them.

    A unit is one feature of the residual stream: its entry in every embedding and norm, its column
    in every projection that reads the stream, its row in every projection that writes to it. Other
    features of that width, such as a pooler's output, are sites of their own.

    Args:
        model: The model.
        others: Its heads and neurons, whose tensors are left out.
    """
    if not isinstance(model, PreTrainedModel):
        return []
    known = {(cut.module, cut.tensor, cut.dim) for site in others for cut in site.cuts}
    return [
        found
        for found in _dimensions(model)
        if isinstance(found, Refusal)
        or not any((cut.module, cut.tensor, cut.dim) in known for cut in found.cuts)
    ]


def _is_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters())
    return bool(
        re.search(families.NORM, type(module).__name__)
        and "weight" in own
        and set(own) <= {"weight", "bias"}
        and all(tensor.ndim == 1 for tensor in own.values())
        and getattr(module, "data_format", "channels_last") == "channels_last"
    )


def _trace(model: PreTrainedModel) -> Trace:
    norms = [path for path, module in model.named_modules() if _is_norm(module)]
    inputs = example_inputs(model, 2, length=LENGTH.get(model.main_input_name))
    unmasked = {name: value for name, value in inputs.items() if name != "attention_mask"}
    try:
        return trace(model, unmasked, norms)
    except Exception as error:
        # Without a mask some models search for padding, in values that a trace lacks.
        logger.debug("not traced without a mask", exc_info=error)
        return trace(model, inputs, norms)


@by_tracing("dimensions")
def _dimensions(model: PreTrainedModel) -> Iterator[Site | Refusal]:
    seen = _trace(model)
    norms = _norms(seen)
    # Most of the model reads the stream.
    reads = {group: len(seen.feeds(cuts)) for group, cuts in seen.places().items()}
    stream = max(norms, key=lambda group: reads.get(group, 0), default=None)
    if stream is None:
        return
    width = _entries(model, seen.places()[stream][0])
    stream = _in_steps(model, seen, stream)
    if seen.axes.reason(stream):
        yield Refusal("dimensions", seen.places()[stream][0].module, seen.axes.reason(stream))
        return
    # Features of the same width have units with the same number of entries.
    for group, cuts in seen.places().items():
        if _entries(model, cuts[0]) == width and seen.axes.size(group) > seen.axes.size(stream):
            units = seen.axes.new(seen.axes.size(stream))
            seen.axes.group((Segment(group),), units)
    norms, places = _norms(seen), seen.places()
    for group, cuts in places.items():
        feeds, reason = seen.feeds(cuts), seen.axes.reason(group)
        as_wide = not reason and _entries(model, cuts[0]) == width
        if feeds and seen.axes.size(group) > 1 and (group in norms or as_wide):
            yield _site(model, seen.axes.size(group), reason, cuts, feeds, norms.get(group, []))


def _norms(seen: Trace) -> dict[int, list[Feed]]:
    """Return the norms that run across each group of axes."""
    norms: dict[int, list[Feed]] = {}
    for path in seen.norms:
        label = seen.axes.resolve(seen.labels[f"{path}.weight"][0]) or ()
        for one in label:
            group, entries = seen.axes.units(one.axis)
            norms.setdefault(group, []).append(Feed(path, width=entries * one.inner))
            if len(label) > 1:
                seen.axes.bind([(one,)], "a norm runs across several runs of them")
    return norms


def _in_steps(model: PreTrainedModel, seen: Trace, stream: int) -> int:
    """Join several dimensions to one unit where the family needs it; return the new group."""
    for path, module in model.named_modules():
        name, step = families.WIDTH_STEPS.get(type(module).__name__, ("", 1))
        if name and seen.axes.size(stream) % step == 0:
            units = seen.axes.new(seen.axes.size(stream) // step)
            seen.axes.group(seen.labels[f"{path}.{name}"][1], units)
    return seen.axes.units(stream)[0]


def _site(
    model: PreTrainedModel,
    size: int,
    reason: str,
    cuts: list[Cut],
    feeds: tuple[Feed, ...],
    norms: list[Feed],
) -> Site | Refusal:
    # The name is the module that writes them: one may read one such run and write another.
    readers = {feed.module for feed in feeds}
    path = next((cut.module for cut in cuts if cut.module not in readers), cuts[0].module)
    reason = reason or why_not(model, cuts, feeds)
    if reason:
        return Refusal("dimensions", path, reason)
    width = cuts[0].widths[0]
    return Site(
        kind="dimensions",
        path=path,
        size=size,
        feeds=feeds,
        cuts=(*cuts, *_unseen(model, size * width, width)),
        masked_norms=tuple(norms),
    )


def _entries(model: nn.Module, cut: Cut) -> int:
    tensor: torch.Tensor = getattr(model.get_submodule(cut.module), cut.tensor)
    return tensor.shape[cut.dim]


def _unseen(model: nn.Module, entries: int, width: int) -> Iterator[Cut]:
    """Yield the tensors along the stream that only training uses."""
    for path, module in model.named_modules():
        for name in families.TRAINING_ONLY:
            tensor = module._parameters.get(name)
            if tensor is not None and tensor.shape[-1] == entries:
                yield Cut(path, name, tensor.ndim - 1, (width,))
