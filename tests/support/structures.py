"""For tests: structures unequal layer by layer, and a check that a model is left alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.structure import KINDS, Kind, Structure


def uneven(
    model: nn.Module, seed: int = 0, drop_layer: bool = True, kinds: Sequence[Kind] = KINDS[:-1]
) -> Structure:
    """Cut every site to another size: one without heads, one without neurons, one layer gone."""
    draw = random.Random(seed)
    units = [site for site in find_units(model, "dimensions" in kinds) if site.kind in kinds]
    sites: dict = {kind: {} for kind in KINDS}
    dropped = set()
    for site in units:
        if site.kind == "layers" and drop_layer and site.size > 1:
            gone = draw.choice(site.removable)
            dropped.add(f"{site.path}.{gone}")
            sites["layers"][site.path] = ([i for i in range(site.size) if i != gone], site.size)
    emptied = set()
    for site in units:
        if site.kind == "layers":
            continue
        size = draw.randint(1, max(site.size - 1, 1))
        if not site.needs_one and site.kind not in emptied and site.layer not in dropped:
            emptied.add(site.kind)
            size = 0
        kept = sorted({*draw.sample(range(site.size), size), *site.fixed})
        sites[site.kind][site.path] = (kept, site.size)
    return Structure.of(sites)


class Unchanged:
    """Checks that a block leaves weights, config, classes and sizes bit for bit."""

    PLAIN = (int, float, str, tuple)

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def _state(self) -> tuple:
        settings = [
            (
                type(m),
                {k: v for k, v in vars(m).items() if k[0] != "_" and isinstance(v, self.PLAIN)},
            )
            for m in self.model.modules()
        ]
        return copy.deepcopy((self.model.config.to_dict(), settings, self.model.training))

    def __enter__(self) -> None:
        self.state = self._state()
        self.parameters = list(self.model.named_parameters())
        self.values = {k: v.clone() for k, v in self.model.state_dict().items()}

    def __exit__(self, *_: object) -> None:
        assert self._state() == self.state
        now = list(self.model.named_parameters())
        assert [name for name, _ in now] == [name for name, _ in self.parameters]
        assert all(a is b for (_, a), (_, b) in zip(now, self.parameters, strict=True))
        after = self.model.state_dict()
        assert list(after) == list(self.values)
        assert all(torch.equal(after[k], v) for k, v in self.values.items())
