"""What losses may need of a teacher's inside, as one tensor per batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfslim.distillation.losses.capture import Seen

__all__ = ["Packing"]


class Packing:
    """Lays some layers' hidden states, and the last attention's vectors, side by side and back.

    Args:
        layers: Numbers of the layers to keep.
        probe: What the teacher has computed on some input, which tells the widths.
    """

    def __init__(self, layers: Sequence[int], probe: Seen) -> None:
        self.layers = list(layers)
        self._number = len(probe.hidden)
        self._hidden = [probe.hidden[t].shape[-1] for t in self.layers]
        self._vectors = [v.shape[-1] for v in probe.vectors]

    def __str__(self) -> str:
        return f"layers {self.layers}, {len(self._vectors)} vectors of the last attention"

    def pack(self, taught: Seen) -> Tensor:
        """Return `[batch, positions, features]` float32."""
        hidden = [taught.hidden[t] for t in self.layers]
        return torch.cat([x.float() for x in (*hidden, *taught.vectors)], -1)

    def unpack(self, packed: Tensor) -> Seen:
        """Return what `pack` was given, with nothing for layers that it does not keep."""
        parts = packed.split([*self._hidden, *self._vectors], -1)
        states = dict(zip(self.layers, parts, strict=False))
        nothing = packed.new_empty(0)
        every = [states.get(t, nothing) for t in range(self._number)]
        return Seen(hidden=every, vectors=list(parts[len(self.layers) :]))
