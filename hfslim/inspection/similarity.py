"""Compare the representations of layers by linear centred kernel alignment."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from hfslim.distillation.losses.capture import Capture, position_mask
from hfslim.measuring.timing import evaluating, placed
from hfslim.pruning.scores.batches import Batches
from hfslim.pruning.scores.importance import UnusableScoresError

logger = logging.getLogger(__name__)

FEWEST = 4
"""Examples that a batch must have for the unbiased estimate."""


def linear_cka(first: Tensor, second: Tensor) -> Tensor:
    """Compare representations of the same examples: 1 if equal up to rotation and scale.

    `HSIC(K, L) / √(HSIC(K, K) HSIC(L, L))` with `K = XXᵀ`, `L = YYᵀ` (Kornblith et al. 2019,
    arXiv 1905.00414). The estimate of HSIC is unbiased, so that few examples of many features
    do not look similar (Song et al. 2012; Nguyen et al. 2021, arXiv 2010.15327, equation 3); it may
    be slightly below 0 or above 1.

    Args:
        first: `[examples, features]`, 4 examples or more.
        second: `[examples, other features]`.

    Returns:
        `[]`, float64.

    Examples:
        >>> x = torch.tensor([[1.0, 0], [0, 2], [3, 1], [1, 1], [0, 4]])
        >>> round(linear_cka(x, 5 * x.flip(1)).item(), 6)  # rotated and scaled
        1.0
    """
    k, m = _grams([first]), _grams([second])
    return (_hsic(k, m) / (_hsic(k, k) * _hsic(m, m)).sqrt()).squeeze()


def layer_similarity(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    other: PreTrainedModel | None = None,
    max_examples: int = 512,
    progress: bool = True,
) -> Tensor:
    """Compare the outputs of layers by linear CKA, within a model or between two.

    A layer's representation of an example is the mean of its output over the positions without
    padding. The unbiased HSIC is averaged over batches (Nguyen et al. 2021, arXiv 2010.15327);
    batches of less than 4 examples are left out.

    Args:
        model: A model, not a wrapper; it is not changed.
        data: Batches of model inputs, best of 32 or more examples; labels are ignored.
        other: A model of the same inputs; by default the model itself.
        max_examples: The maximal number of examples.
        progress: Whether to show a progress bar.

    Returns:
        `[layers, layers of other]`, float64, layers in the order of the forward pass.

    Raises:
        ValueError: hfslim finds no layers, or no batch has 4 examples.
    """
    models = [model] if other is None else [model, other]
    captures = [Capture(m, hidden=True, attentions=False, vectors=False) for m in models]
    totals: dict[str, Tensor | float] = {"cross": 0.0, "first": 0.0, "second": 0.0}
    left_out = used = 0
    with evaluating(*models):
        for batch in track(
            Batches(data, max_examples), "comparing", disable=not progress, transient=True
        ):
            grams = [_grams(_pooled(m, c, batch)) for m, c in zip(models, captures, strict=True)]
            ours, theirs = grams[0], grams[-1]
            if ours.shape[-1] < FEWEST:
                left_out += ours.shape[-1]
                continue
            used += ours.shape[-1]
            totals["cross"] += _hsic(ours, theirs)
            totals["first"] += _hsic(ours, ours).diagonal()
            totals["second"] += _hsic(theirs, theirs).diagonal()
    if left_out:
        logger.info("%d examples are in batches of less than %d: left out", left_out, FEWEST)
    cross, first, second = (torch.as_tensor(total) for total in totals.values())
    if not used:
        raise UnusableScoresError(f"no batch of at least {FEWEST} examples to compare layers on")
    return cross / (first.unsqueeze(1) * second).sqrt()


def _pooled(model: PreTrainedModel, capture: Capture, batch: Mapping[str, Any]) -> list[Tensor]:
    """Return the mean output of each layer, `[examples, features]`."""
    inputs = {k: v for k, v in placed(model, batch).items() if k not in ("labels", "label")}
    with capture.recording() as seen:
        model(**inputs)
    pooled = []
    for states in seen.hidden:
        mask = position_mask(model, inputs, states.shape[1])
        weight = states.new_ones(states.shape[:2]) if mask is None else mask.to(states)
        total = (states * weight.unsqueeze(-1)).sum(1)
        pooled.append(total / weight.sum(1, keepdim=True).clamp_min(1))
    return pooled


def _grams(representations: Iterable[Tensor]) -> Tensor:
    """Return the Gram matrices of the examples with a zero diagonal, `[layers, n, n]`."""
    grams = torch.stack([x.double() @ x.double().T for x in representations])
    grams.diagonal(dim1=1, dim2=2).zero_()
    return grams


def _hsic(first: Tensor, second: Tensor) -> Tensor:
    """Return the unbiased HSIC of every pair of Gram matrices, `[layers, layers]`."""
    n = first.shape[-1]
    product = torch.einsum("aij,bij->ab", first, second)
    rows, other = first.sum(2), second.sum(2)
    means = rows.sum(1).unsqueeze(1) * other.sum(1) / ((n - 1) * (n - 2))
    return (product + means - 2 / (n - 2) * rows @ other.T) / (n * (n - 3))
