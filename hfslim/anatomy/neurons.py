"""Find the neurons of one feed-forward module."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from hfslim.anatomy import feed_forwards
from hfslim.anatomy.attention import Find
from hfslim.anatomy.projections import cuts_of, feed_of, groups_of, own_tensors
from hfslim.anatomy.slices import Cut, Feed
from hfslim.anatomy.units import Refusal, Site


def find_neurons(path: str, modules: Mapping[str, nn.Module], find: Find) -> Site | Refusal | None:
    """Return the neurons of a module, why none can go, or None if it is no feed-forward module.

    Args:
        path: Path of the module.
        modules: All modules of the model, by path.
        find: Finds projections by name.
    """
    reason = feed_forwards.REFUSED_NEURONS.get(type(modules[path]).__name__)
    if reason:
        return Refusal("neurons", path, reason)
    found = (_neurons(path, modules, find, names) for names in feed_forwards.FEED_FORWARDS)
    return next((one for one in found if one is not None), None)


def _neurons(
    path: str, modules: Mapping[str, nn.Module], find: Find, names: feed_forwards.FeedForward
) -> Site | Refusal | None:
    inputs = [one for name in names.inputs if (one := find(path, (name,))) is not None]
    output = find(path, (names.output,))
    middle = [f"{path}.{name}" for name in (names.between, names.norm) if name]
    if output is None or len(inputs) < len(names.inputs) or set(middle) - set(modules):
        return None
    if names.across and f"{path}.{names.across}" in modules:
        reason = f"{names.across!r} runs across all of them, so none can go exactly"
        return Refusal("neurons", path, reason)
    blocks = groups_of([*inputs, output])
    if blocks:
        return Site(
            kind="neurons",
            path=path,
            size=output.inputs // blocks,
            feeds=(feed_of(output, blocks, 1),),
            cuts=cuts_of(inputs, output, blocks, 1),
            fixed=(0,),
        )
    size = output.inputs
    if any(one.outputs != size * names.blocks for one in inputs):
        return None
    counts = [n for n in feed_forwards.NEURON_COUNTS if vars(modules[path]).get(n) == size]
    between = (
        Cut(name, tensor, 0)
        for name in middle
        for tensor, value in own_tensors(modules[name]).items()
        if value.ndim
    )
    rows = (cut for one in inputs for cut in one.rows(*[1] * names.blocks))
    return Site(
        kind="neurons",
        path=path,
        size=size,
        feeds=(Feed(output.path),),
        cuts=(*rows, *between, *output.columns(1)),
        attributes=tuple((name, 1) for name in counts),
        fixed=(0,) if middle else (),
    )
