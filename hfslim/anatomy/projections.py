"""Linear maps in their several classes: sizes, and the tensors that lie along each side."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from hfslim.anatomy.units import Cut


@dataclass(frozen=True)
class Projection:
    """One linear map inside a model.

    Attributes:
        path: Where it is.
        inputs: Features that go in.
        outputs: Features that come out.
        along_outputs: Tensors and their dimension that has an entry per output.
        along_inputs: Tensors and their dimension that has an entry per input.
        groups: Of a convolution over single positions, its groups; 0 of linear maps.
    """

    path: str
    inputs: int
    outputs: int
    along_outputs: tuple[tuple[str, int], ...]
    along_inputs: tuple[tuple[str, int], ...]
    groups: int = 0

    @classmethod
    def at(cls, path: str, module: nn.Module | None) -> Projection | None:
        """Return the projection that a module is, if it is one."""
        weight = getattr(module, "weight", None)
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            return cls(path, inputs, outputs, (("weight", 1), ("bias", 0)), (("weight", 0),))
        if isinstance(module, nn.Conv1d) and (*module.kernel_size, *module.stride) == (1, 1):
            outputs, inputs = module.out_channels, module.in_channels
            along = tuple((name, 0) for name, _ in module.named_parameters(recurse=False))
            return cls(path, inputs, outputs, along, (("weight", 1),), module.groups)
        if module is None or weight is None or weight.ndim != 2:
            return None
        # Quantised look-alikes share these names; embeddings and norms do not.
        if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
            return None
        outputs, inputs = weight.shape
        tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers())}
        rows = [name for name, t in tensors.items() if t.ndim and t.shape[0] == outputs]
        columns = [name for name, t in tensors.items() if t.shape == weight.shape]
        return cls(
            path, inputs, outputs, tuple((n, 0) for n in rows), tuple((n, 1) for n in columns)
        )

    def rows(self, *widths: int) -> list[Cut]:
        """Return the cuts of the outputs, in blocks of so many per unit each."""
        return [Cut(self.path, name, dim, widths) for name, dim in self.along_outputs]

    def columns(self, *widths: int) -> list[Cut]:
        """Return the cuts of the inputs, in blocks of so many per unit each."""
        return [Cut(self.path, name, dim, widths) for name, dim in self.along_inputs]
