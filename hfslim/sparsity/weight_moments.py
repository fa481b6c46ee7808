"""Second moments of what linear layers and convolutions get, for weights that go one by one."""

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
from hfslim.pruning.obs.backward_pass import listen
from hfslim.pruning.obs.moments import InputMoments
from hfslim.pruning.scores.batches import fitting
from hfslim.pruning.scores.importance import UnusableScoresError
from hfslim.training.ranks import add_over_ranks


def matrices(module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """Lay out a tensor in the shape of a module's weight as matrices, one per group of channels.

    The input channels of one position of a kernel stand side by side.

    Returns:
        `[groups, outputs, inputs]`.
    """
    tensor = outputs_first(module, tensor)
    groups = getattr(module, "groups", 1)
    return tensor.movedim(1, -1).reshape(groups, len(tensor) // groups, -1)


def from_matrices(module: nn.Module, matrices: torch.Tensor) -> torch.Tensor:
    """Undo `matrices`."""
    out, channels, *kernel = outputs_first(module, weight_of(module)).shape
    return outputs_first(module, matrices.reshape(out, *kernel, channels).movedim(-1, 1))


def moments_size(module: nn.Module) -> int:
    """Return the bytes of the sums over a module's inputs, but for what is no matrix."""
    groups, _, inputs = matrices(module, weight_of(module)).shape
    return 8 * groups * inputs * inputs


def gather_inputs(
    model: PreTrainedModel,
    weights: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    weighed: bool,
    progress: bool = True,
    wanted: Iterable[str] | None = None,
    title: str = "second moments",
) -> dict[str, list[InputMoments]]:
    """Sum second moments of the inputs of modules, in one pass over data.

    A position counts where the model's decision depends on what the module computes there, so
    padding does not. No labels are needed, and the model is not changed.

    Args:
        model: The model, not a wrapper.
        weights: The modules, as of `find_weights`.
        batches: Model inputs; labels are passed over.
        weighed: Whether a position counts by the square of the decision's gradient, instead of 1.
        progress: Whether to show a progress bar.
        wanted: Paths of those whose moments are wanted; all if not given.
        title: What the progress bar says.

    Returns:
        The sums over the examples of all ranks by path, for each group of channels.

    Raises:
        UnusableScoresError: There are no examples, or an activation or gradient is not finite; the
            message names the module.
        ValueError: No decision depends on a module.
    """

    def once(batches: Iterable[Mapping[str, Any]]) -> tuple[dict[str, list[InputMoments]], int]:
        found = {}
        for path in weights if wanted is None else wanted:
            module = weights[path]
            weight = weight_of(module)
            groups, _, inputs = matrices(module, weight).shape
            shapes = ((), (inputs,), (inputs, inputs))
            found[path] = [InputMoments.nothing(weight.device, *shapes) for _ in range(groups)]

        def heard(path: str, x: torch.Tensor, g: torch.Tensor) -> None:
            if path not in found:
                return
            squares = by_group(weights[path], g.float().square())
            counts = squares if weighed else (squares > 0).float()
            inputs = inputs_of(weights[path], x)
            for moments, one, count in zip(found[path], inputs, counts, strict=True):
                moments.add_inputs(one, count)

        # Attentions that read the weights of their projections run them meanwhile.
        with Gates(model):
            return found, listen(model, weights, batches, heard, progress, title=title)

    found, examples = fitting(once, batches)
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
    """Return what each position of the output is computed from, `[groups, positions, inputs]`."""
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
