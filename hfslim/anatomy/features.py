"""The features along each dimension of a pass's tensors, and how operations carry them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfslim.anatomy.axes import Axes, Label, Segment, blocks

Labels = list[Label]

ACROSS = "a norm runs across them"
RESHAPED = "they are taken apart and put together anew"
TRANSPOSED = "a transposed convolution takes them"
COMPUTED = "the weights that they meet are computed as the model runs"
SAME = {
    *("clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh", "native_dropout"),
    *("fill_", "zero_", "hardswish", "hardswish_", "log_sigmoid_forward"),
}
"""Operations that leave every feature in its place, beside those that torch tags as pointwise."""
BATCH_NORMS = {
    *("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"),
    *("_native_batch_norm_legit", "_batch_norm_with_update", "batch_norm"),
}
SPATIAL = ("pool", "upsample", "constant_pad", "reflection_pad", "replication_pad")
"""Parts of the names of operations that work on positions, channel by channel."""
REDUCING = {"mean", "sum", "amax", "amin", "_softmax", "_log_softmax", "var", "std", "norm"}


@dataclass
class _Followed:
    """A tensor, its labels, and the name of the parameter that it is a view of, if any."""

    tensor: torch.Tensor
    labels: Labels
    name: str = ""


class Features:
    """Labels the dimensions of a model's tensors, and of those that operations make of them.

    Attributes:
        axes: The axes of features, tied where they can only go together.
        tensors: The model's parameters and buffers.
        makers: Parameters that make features, in the order of the pass.
        takers: Parameters that take features, with the dimensions of the input and of the
            parameter that these lie along.
    """

    def __init__(self, model: nn.Module) -> None:
        self.axes = Axes()
        self.makers: dict[str, None] = {}
        self.takers: dict[tuple[str, int, int], None] = {}
        self.tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self._seen: dict[int, _Followed] = {}
        for name, tensor in self.tensors.items():
            self.keep(tensor, [self.axes.new(n, free=True) for n in tensor.shape], name)
        for where in (model.named_parameters, model.named_buffers):
            for name, tensor in where(remove_duplicate=False):
                if self._name(tensor) != name:
                    shared = f"they are shared with {self._name(tensor)!r}"
                    self.axes.bind(self.labels(tensor), shared)

    def labels(self, tensor: torch.Tensor) -> Labels:
        """Return the label of each dimension of a tensor."""
        seen = self._seen.get(id(tensor))
        return seen.labels if seen else [None] * tensor.ndim

    def keep(self, tensor: torch.Tensor, labels: Labels, name: str = "") -> None:
        """Note the labels of a tensor, and the parameter that it is a view of."""
        # Holding on to the tensor keeps its id from being used again.
        self._seen[id(tensor)] = _Followed(tensor, labels, name)

    def rule(self, name: str, func: Any) -> Callable[..., None] | None:
        """Return the method that labels the result of an operation, if there is one."""
        if hasattr(self, f"_on_{name}"):
            return getattr(self, f"_on_{name}")
        if name in SAME or torch.Tag.pointwise in func.tags:
            return self._entry_by_entry
        if name in BATCH_NORMS:
            return self._batch_norm
        if name in REDUCING:
            return self._reduce
        if any(part in name for part in SPATIAL):
            return self._spatial
        return None

    def bind(self, values: Any, reason: str) -> None:
        """Note why no feature of some tensors can go."""
        self.axes.bind((label for t in _among(values) for label in self.labels(t)), reason)

    def _name(self, tensor: torch.Tensor) -> str:
        seen = self._seen.get(id(tensor))
        return seen.name if seen else ""

    def _entry_by_entry(self, result: Any, *args: Any, **kwargs: Any) -> None:
        result = result[0] if isinstance(result, tuple) else result
        tensors = [t for t in _among((args, kwargs)) if t.ndim]
        labels: Labels = []
        for dim in range(-result.ndim, 0):
            there = [t for t in tensors if t.ndim >= -dim and t.shape[dim] == result.shape[dim] > 1]
            for other in there[1:]:
                if self.labels(there[0])[dim] or self.labels(other)[dim]:
                    self.axes.tie(self.labels(there[0])[dim], self.labels(other)[dim])
            labels.append(self.labels(there[0])[dim] if there else None)
        name = self._name(tensors[0]) if len(tensors) == 1 else ""
        self.keep(result, labels, name if tensors and result is tensors[0] else "")

    def _batch_norm(self, result: Any, x: torch.Tensor, *vectors: Any, **_: Any) -> None:
        for vector in vectors[:4]:
            if isinstance(vector, torch.Tensor):
                self.axes.tie(self.labels(x)[1], self.labels(vector)[0])
        self.keep(result[0] if isinstance(result, tuple | list) else result, self.labels(x))

    def _on_native_group_norm(self, result: Any, x: torch.Tensor, *rest: Any) -> None:
        _, _, _, channels, _, groups, _ = rest
        self._batch_norm(result, x, *rest[:2])
        if groups != channels:
            self.axes.bind(self.labels(x)[1:], ACROSS)

    def _on_native_layer_norm(self, result: Any, x: Any, shape: Sequence[int], *_: Any) -> None:
        self.axes.bind(self.labels(x)[-len(shape) :], ACROSS)
        self.keep(result[0], self.labels(x))

    def _on_masked_fill_(self, result: Any, x: torch.Tensor, mask: torch.Tensor, *_: Any) -> None:
        # The mask may be one of positions, spread over all features.
        self.bind(mask, "some of them are masked")
        self.keep(result, self.labels(x))

    def _on__weight_norm_interface(
        self, result: Any, direction: Any, length: Any, dim: int = 0
    ) -> None:
        self.axes.tie(self.labels(direction)[dim], self.labels(length)[dim])
        self.keep(result[0], self.labels(direction), self._name(direction))

    def _on_embedding(self, result: Any, weight: torch.Tensor, rows: torch.Tensor, *_: Any) -> None:
        self.axes.bind(self.labels(weight)[:1], "they are chosen by number")
        self.keep(result, [*[None] * rows.ndim, self.labels(weight)[1]])

    def _on_convolution(self, result: Any, x: Any, weight: Any, bias: Any, *how: Any) -> None:
        transposed, groups = how[3], how[5]
        makes, takes, *_ = self.labels(weight)
        name = self._name(weight)
        if transposed or not name:
            self.bind((x, weight), TRANSPOSED if transposed else COMPUTED)
            return
        if groups == 1:
            self.axes.tie(self.labels(x)[1], takes)
            self.takers[name, 1, 1] = None
        else:
            units = self.axes.new(groups)
            self.axes.group(self.labels(x)[1], units)
            self.axes.group(makes, units)
        if bias is not None:
            self.axes.tie(makes, self.labels(bias)[0])
        self.makers[name] = None
        self.keep(result, [self.labels(x)[0], makes, *[None] * (result.ndim - 2)])

    def _on_mm(self, result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        name = self._name(weight)
        if not name or self._name(x):
            self.bind((x, weight), "they are multiplied together")
            return
        self.axes.tie(self.labels(x)[1], self.labels(weight)[0])
        self.takers[name, -1, 0 if self.tensors[name] is weight else 1] = None
        self.makers[name] = None
        self.keep(result, [self.labels(x)[0], self.labels(weight)[1]])

    def _on_addmm(self, result: Any, bias: Any, x: Any, weight: Any, **_: Any) -> None:
        self._on_mm(result, x, weight)
        self.axes.tie(self.labels(bias)[-1], self.labels(result)[1])

    def _spatial(self, result: Any, x: torch.Tensor, *args: Any, **_: Any) -> None:
        for one in result if isinstance(result, tuple) else (result,):
            same = [a == b for a, b in zip(x.shape, one.shape, strict=True)]
            # A padded or pooled dimension holds no features, unless it is labelled.
            gone = [label for label, kept in zip(self.labels(x), same, strict=True) if not kept]
            self.axes.bind(gone, "their number changes on the way")
            labels = zip(self.labels(x), same, strict=True)
            self.keep(one, [label if kept else None for label, kept in labels])

    def _reduce(self, result: torch.Tensor, x: torch.Tensor, *args: Any, **_: Any) -> None:
        dims = args[0] if args and args[0] is not None else range(x.ndim)
        gone = {d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)}
        self.axes.bind((self.labels(x)[d] for d in gone), "they are added up or averaged")
        keeps = result.ndim == x.ndim
        labels = [None if d in gone else label for d, label in enumerate(self.labels(x))]
        self.keep(result, [one for d, one in enumerate(labels) if keeps or d not in gone])

    def _on_permute(self, result: torch.Tensor, x: torch.Tensor, dims: Sequence[int]) -> None:
        self.keep(result, [self.labels(x)[d] for d in dims])

    def _on_glu(self, result: torch.Tensor, x: torch.Tensor, dim: int = -1) -> None:
        """Tie each feature to its gate, in the other half."""
        labels, half = list(self.labels(x)), self.axes.new(result.shape[dim])
        if labels[dim] is not None:
            self.axes.tie(labels[dim], half + half)
            labels[dim] = half
        self.keep(result, labels)

    def _on_transpose(self, result: torch.Tensor, x: torch.Tensor, a: int, b: int) -> None:
        dims = list(range(x.ndim))
        dims[a], dims[b] = dims[b], dims[a]
        self._on_permute(result, x, dims)

    def _on_t(self, result: torch.Tensor, x: torch.Tensor) -> None:
        self.keep(result, self.labels(x)[::-1], self._name(x))

    def _on_view(self, result: torch.Tensor, x: torch.Tensor, *_: Any, **__: Any) -> None:
        self.keep(result, self._reshaped(x, result.shape))

    _on__unsafe_view = _on_reshape = _on_unsqueeze = _on_squeeze = _on__reshape_alias = _on_view

    def _on_expand(self, result: torch.Tensor, x: torch.Tensor, *_: Any, **__: Any) -> None:
        added: Labels = [None] * (result.ndim - x.ndim)
        sizes = zip(self.labels(x), x.shape, strict=True)
        self.keep(result, added + [label if n > 1 else None for label, n in sizes])

    def _on_slice(self, result: Any, x: torch.Tensor, dim: int = 0, *_: Any, **__: Any) -> None:
        labels = list(self.labels(x))
        if result.shape[dim] != x.shape[dim]:
            self._drop(result, labels[dim])
            labels[dim] = None
        self.keep(result, labels)

    def _on_select(self, result: Any, x: torch.Tensor, dim: int, _: int) -> None:
        labels = list(self.labels(x))
        self._drop(result, labels.pop(dim))
        self.keep(result, labels)

    def _on_roll(self, result: Any, x: torch.Tensor, _: Any, dims: Sequence[int] = ()) -> None:
        self.axes.bind((self.labels(x)[d] for d in dims or range(x.ndim)), RESHAPED)
        self.keep(result, self.labels(x))

    def _drop(self, result: torch.Tensor, label: Label) -> None:
        # A sub-layer that has lost every unit takes nothing.
        if result.numel():
            self.axes.bind([label], "only some of them are used at one place")

    def _on_cat(self, result: torch.Tensor, parts: Sequence[torch.Tensor], dim: int = 0) -> None:
        parts = [part for part in parts if part.numel() or part.ndim > 1]
        labels = list(self.labels(parts[0]))
        for other in parts[1:]:
            for d, label in enumerate(self.labels(other)):
                if d != dim % result.ndim and (label or labels[d]):
                    self.axes.tie(labels[d], label)
        along = [self.axes.resolve(self.labels(part)[dim]) for part in parts]
        for i, label in enumerate(along) if any(along) else ():
            if label is None:
                along[i] = label = self.axes.new(parts[i].shape[dim])
                self.axes.bind([label], "they lie beside features that are no channels")
        labels[dim] = tuple(one for label in along for one in label or ()) or None
        self.keep(result, labels)

    def _reshaped(self, x: torch.Tensor, shape: Sequence[int]) -> Labels:
        """Label the dimensions that a view merges and splits."""
        labels: Labels = [None] * len(shape)
        for old, new in blocks(x.shape, shape):
            there = [self.labels(x)[d] for d in old]
            if not any(there) or not new:
                continue
            outer = self.axes.resolve(there[0]) or ()
            alone = outer[0].axis if len(old) == len(outer) == 1 else None
            if len(old) == len(new) == 1:
                labels[new[0]] = there[0]
            elif len(new) == 1 and outer and not any(there[1:]):
                inner = shape[new[0]] // x.shape[old[0]]
                labels[new[0]] = tuple(Segment(s.axis, s.inner * inner) for s in outer)
            elif alone is not None and self.axes.size(alone) == shape[new[0]]:
                labels[new[0]] = self.axes.resolve((Segment(alone),))
            else:
                self.axes.bind(there, RESHAPED)
        return labels


def _among(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    many = isinstance(values, list | tuple)
    return [tensor for value in values for tensor in _among(value)] if many else []
