"""A search for a structure: the model, its units, the target, and the price of structures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from hfslim.anatomy.inputs import Stated, stated_inputs
from hfslim.anatomy.structure import Key, Structure
from hfslim.anatomy.units import Units
from hfslim.pruning.latency.latency_measurement import aligned_step, latency_table
from hfslim.pruning.search.best import best_structure
from hfslim.pruning.search.plain_config import Stream, check_plain
from hfslim.pruning.search.price import UNPRICED, Price
from hfslim.pruning.search.uniform import uniform_structure
from hfslim.pruning.search.unit_costs import count
from hfslim.pruning.target import Target


@dataclass(frozen=True)
class Search:
    """The search for the units that a model keeps.

    Attributes:
        model: The model, not a wrapper; it is not changed.
        units: The sites that may lose units.
        target: What the model may cost.
        price: What structures cost. Under a latency that no table can hold, these are
            multiply-accumulates, and the latency is met by timing.
        inputs: The input at which they cost that; empty under a sparsity.
        uniform: Whether all layers keep the same numbers of units.
        stream: The possible widths of the residual stream under `uniform`.
    """

    model: PreTrainedModel
    units: Units
    target: Target
    price: Price = UNPRICED
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    uniform: bool = False
    stream: Stream | None = None

    @classmethod
    def priced(
        cls,
        model: PreTrainedModel,
        units: Units,
        target: Target,
        inputs: Stated | None = None,
        uniform: bool = False,
        progress: bool = True,
    ) -> Search:
        """Price the units in a target's resource, and return the search.

        Latencies are measured, unless the cache holds them. Where units share their costs, the cost
        of one depends on the others, so that no table can hold it: the price is then in
        multiply-accumulates, in numbers of units that the device computes without waste.

        Raises:
            ValueError: The config cannot express uniform cuts of these units.
            RuntimeError: The model does not run its layers as modules, so they cannot be timed.
        """
        stream = check_plain(model, units) if uniform else None
        if target.resource == "sparsity":
            return cls(model, units, target, uniform=uniform, stream=stream)
        stated = stated_inputs(model, inputs)
        price: Price
        if target.resource != "latency":
            price = count(model, units, target.resource, stated)
        elif any(site.coupled for site in units):
            price = replace(count(model, units, "macs", stated), step=aligned_step(model))
        else:
            price = latency_table(model, units, stated, progress)
        return cls(model, units, target, price, stated, uniform, stream)

    def structure(
        self, scores: Mapping[Key, torch.Tensor], within: Structure | None = None
    ) -> Structure:
        """Find the structure of greatest importance, `[units]` by site, at the target.

        It is part of `within`, where that is given; not under `uniform`.

        Raises:
            UnreachableTargetError: The target cannot be met; the message gives the nearest that
                can.
        """
        if self.uniform:
            return uniform_structure(self.units, scores, self.target, self.price, self.stream)
        return best_structure(self.units, scores, self.target, self.price, within)
