"""Find the channels of a model's convolutions that can be removed exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel

from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.slices import Cut
from hfslim.anatomy.tracing import CONVOLUTIONS, Trace, by_tracing, trace, why_not
from hfslim.anatomy.units import Refusal, Site

SENSES = ("pixel_values", "input_values", "input_features")
"""Main inputs that convolutions take channel by channel; in text models they take hidden states."""


def find_channels(model: nn.Module, others: Sequence[Site]) -> list[Site | Refusal]:
    """Find the channels whose makers and takers are all known.

    A unit is the entries that can only go at once: output `i` of a convolution, with its norm, its
    depthwise filter, output `i` of every convolution that is added to it, and input `i` of all that
    take it. It is gated where it is taken, so that biases and norms on the way add nothing.

    Args:
        model: The model.
        others: Its heads and neurons, whose tensors are left out.

    Returns:
        Sites and refusals in the order of the forward pass.
    """
    if not isinstance(model, PreTrainedModel) or model.main_input_name not in SENSES:
        return []
    if not any(isinstance(module, CONVOLUTIONS) for module in model.modules()):
        return []
    known = {(cut.module, cut.tensor, cut.dim) for site in others for cut in site.cuts}
    weights = {(module, tensor) for module, tensor, _ in known}
    result: list[Site | Refusal] = []
    for found in _channels(model):
        cuts = found.cuts if isinstance(found, Site) else ()
        if not any((cut.module, cut.tensor) in weights for cut in cuts):
            result.append(found)
        elif not any((cut.module, cut.tensor, cut.dim) in known for cut in cuts):
            reason = "they are the hidden width of attention or feed-forward layers"
            result.append(Refusal("channels", found.path, reason))
    return result


@by_tracing("channels")
def _channels(model: PreTrainedModel) -> Iterator[Site | Refusal]:
    seen = trace(model, example_inputs(model, 2))
    places = seen.places()
    done = set()
    convolutions = [f"{p}.weight" for p, m in model.named_modules() if isinstance(m, CONVOLUTIONS)]
    for name in dict.fromkeys((*seen.makers, *(n for n in convolutions if n in seen.labels))):
        for maker in seen.axes.resolve(seen.labels[name][0]) or ():
            group, _ = seen.axes.units(maker.axis)
            if group not in done:
                done.add(group)
                found = _site(model, seen, name.rpartition(".")[0], group, places[group])
                if found is not None:
                    yield found


def _site(
    model: PreTrainedModel, seen: Trace, path: str, group: int, cuts: list[Cut]
) -> Site | Refusal | None:
    feeds = seen.feeds(cuts)
    size, reason = seen.axes.size(group), seen.axes.reason(group)
    convolved = any(isinstance(model.get_submodule(cut.module), CONVOLUTIONS) for cut in cuts)
    if not convolved or not (feeds or reason):
        return None
    if size < 2:
        reason = reason or "all of them are bound together"
    reason = reason or why_not(model, cuts, feeds)
    if reason:
        return Refusal("channels", path, reason)
    return Site(kind="channels", path=path, size=size, feeds=feeds, cuts=tuple(cuts))
