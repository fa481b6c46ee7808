"""Sites whose modules share weights: they lose the same units at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from torch import nn

from hfslim.anatomy.units import Refusal, Site


def joined(sites: Iterable[Site], modules: Mapping[str, nn.Module]) -> Iterator[Site | Refusal]:
    """Join sites that share all weights into one; refuse those that share some.

    Args:
        sites: Sites of heads, neurons and experts.
        modules: All modules of the model, by path.
    """
    owners = Counter(
        id(parameter)
        for module in modules.values()
        for parameter in set(module._parameters.values()) - {None}
    )
    shared: dict[tuple[int, ...], list[Site]] = {}
    for site in sites:
        tensors = tuple(id(getattr(modules[cut.module], cut.tensor)) for cut in site.cuts)
        if any(owners[tensor] > 1 for tensor in tensors):
            shared.setdefault(tensors, []).append(site)
        else:
            yield site
    for tensors, same in shared.items():
        first, *others = same
        inside = all(site.gate.startswith(f"{site.path}.") for site in same)
        if others and inside and all(owners[t] in (0, len(same)) for t in tensors):
            yield replace(
                first,
                cuts=tuple(cut for site in same for cut in site.cuts),
                feeds=tuple(feed for site in same for feed in site.feeds),
                twins=tuple(site.path for site in others),
            )
        else:
            for site in same:
                yield Refusal(site.kind, site.path, "other modules share its weights")
