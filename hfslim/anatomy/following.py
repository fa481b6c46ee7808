"""Follow the features of a model from the tensors that make them to those that take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hfslim.anatomy.features import Features


class Follower(TorchDispatchMode):
    """Labels every tensor that a forward pass makes.

    Attributes:
        features: The labels.
        norms: The norms that were followed as a whole, in the order of the pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.features = Features(model)
        self.norms: dict[str, None] = {}
        self._inside = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        rule = self.features.rule(name, func)
        if rule is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if rule is None:
            self.features.bind((args, kwargs), f"they pass through {name!r}")
        else:
            rule(result, *args, **kwargs)
        return result

    def enter_norm(self, _: nn.Module, __: tuple) -> None:
        """Follow nothing inside a norm that is followed as a whole."""
        self._inside += 1

    def leave_norm(self, path: str, norm: nn.Module, args: tuple, result: torch.Tensor) -> None:
        """Note that a norm has left features in their places."""
        self._inside -= 1
        self.norms[path] = None
        labels = self.features.labels(args[0])
        for vector in norm.parameters(recurse=False):
            self.features.axes.tie(labels[-1], self.features.labels(vector)[0])
        self.features.keep(result, labels)
