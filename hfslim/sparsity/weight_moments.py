"""Second moments of the inputs of linear layers and convolutions, to remove single weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from hfslim.anatomy.weights import outputs_first, weight_of
from hfslim.pruning.gates.gates import Gates
from hfslim.pruning.obs.backward_pass import run_backward
from hfslim.pruning.obs.moments import InputMoments
from hfslim.pruning.scores.batches import run_within_memory
from hfslim.pruning.scores.importance import UnusableScoresError
from hfslim.training.ranks import add_over_ranks


def matrices(module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """Reshape a tensor in the shape of a module's weight to one matrix per group of channels.

    The input channels of one kernel position are adjacent.

    Returns:
        `[groups, outputs, inputs]`.
    """
    tensor = outputs_first(module, tensor)
    groups = getattr(module, "groups", 1)
    return tensor.movedim(1, -1).reshape(groups, len(tensor) // groups, -1)


def from_matrices(module: nn.Module, matrices: torch.Tensor) -> torch.Tensor:
    """Reshape the result of `matrices` back."""
    out, channels, *kernel = outputs_first(module, weight_of(module)).shape
    return outputs_first(module, matrices.reshape(out, *kernel, channels).movedim(-1, 1))


def moments_size(module: nn.Module) -> int:
    """Return the bytes of the second moments of a module's inputs."""
    groups, _, inputs = matrices(module, weight_of(module)).shape
    return 8 * groups * inputs * inputs


def gather_inputs(
    model: PreTrainedModel,
    weights: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    weighted: bool,
    progress: bool = True,
    wanted: Iterable[str] | None = None,
    title: str = "second moments",
) -> dict[str, list[InputMoments]]:
    """Sum second moments of the inputs of modules, in one pass over data.

    A position counts if the model's decision depends on the module's output there, so padding does
    not: as 1, or if `weighted` as the squared gradient of the decision. No labels are needed, and
    the model is not changed.
    """

    def once(batches: Iterable[Mapping[str, Any]]) -> tuple[dict[str, list[InputMoments]], int]:
        found = {}
        for path in weights if wanted is None else wanted:
            module = weights[path]
            weight = weight_of(module)
            groups, _, inputs = matrices(module, weight).shape
            shapes = ((), (inputs,), (inputs, inputs))
            found[path] = [InputMoments.zeros(weight.device, *shapes) for _ in range(groups)]

        def on_gradient(path: str, x: torch.Tensor, g: torch.Tensor) -> None:
            if path not in found:
                return
            squares = by_group(weights[path], g.float().square())
            counts = squares if weighted else (squares > 0).float()
            inputs = inputs_of(weights[path], x)
            for moments, one, count in zip(found[path], inputs, counts, strict=True):
                moments.add_inputs(one, count)

        # Gates make attentions that read the weights of their projections run them as modules.
        with Gates(model):
            examples = run_backward(model, weights, batches, on_gradient, progress, title=title)
        return found, examples

    found, examples = run_within_memory(once, batches)
    for moments in (one for parts in found.values() for one in parts):
        moments.reduce()
    if not add_over_ranks(torch.tensor(examples, device=model.device)):
        raise UnusableScoresError("no examples were scored: the calibration data is empty")
    for path, parts in found.items():
        if not all(torch.isfinite(one.second).all() for one in parts):
            raise UnusableScoresError(f"gradients at {path!r} are not finite")
        if not any(one.weight for one in parts):
            raise ValueError(
                f"no decision depends on {path!r}, or {type(model).__name__} does not run it as a "
                "module: leave it out with exclude_modules, or use method='magnitude'"
            )
    return found


def by_group(module: nn.Module, squares: torch.Tensor) -> torch.Tensor:
    """Sum over the outputs of each group, `[groups, positions]`."""
    if isinstance(module, _ConvNd):
        return squares.unflatten(1, (module.groups, -1)).sum(2).transpose(0, 1).flatten(1)
    return squares.sum(-1).reshape(1, -1)


def inputs_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the input patch of each output position, `[groups, positions, inputs]`."""
    if not isinstance(module, _ConvNd):
        return x.reshape(1, -1, x.shape[-1])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    sizes = list(zip(module.kernel_size, module.stride, module.dilation, strict=True))
    for dim, (size, stride, dilation) in enumerate(sizes, 2):
        x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # From [examples, groups · channels, *positions, *kernel].
    x = x.unflatten(1, (module.groups, -1)).movedim(2, -1).movedim(1, 0)
    return x.flatten(1, 1 + len(sizes)).flatten(2)
