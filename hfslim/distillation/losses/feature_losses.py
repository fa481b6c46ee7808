"""Losses on hidden states and attention, one value per example, and the table of their names.

Shapes: `B` examples, `S` positions (tokens, patches, frames), `D` features, `H` heads. Hidden
states are `[B, S, D]`, attention probabilities `[B, H, S, S]`, results `[B]`. A mask is `[B, S]`, 1
where a position counts; without a mask all positions count. Every example has the same weight,
whatever its number of positions, so that the mean does not depend on the layout of batches. All
losses are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "FEATURE_LOSSES",
    "FeatureLoss",
    "attention_kl",
    "attention_mse",
    "hidden_cosine",
    "hidden_l1_cosine",
    "hidden_mse",
    "relation_kl",
]


@dataclass(frozen=True)
class FeatureLoss:
    """A feature loss and the tensors that it compares.

    Attributes:
        function: Takes the student's tensor, the teacher's, and the mask; for `vectors`, the number
            of relation heads before the mask. Returns `[B]`.
        on: `hidden` states `[B, S, D]` or `attentions` `[B, H, S, S]` of the paired layers, or the
            last attention's `vectors` `[B, S, D]` (queries, keys, values).
        vectors: For `vectors`, which are compared: 0 queries, 1 keys, 2 values.
        last_attention: Whether `attention_kl` of the last layer's attention is added to the mean.
    """

    function: Callable[..., Tensor]
    on: Literal["hidden", "attentions", "vectors"]
    vectors: tuple[int, ...] = (0, 1, 2)
    last_attention: bool = False

    @property
    def needs_attentions(self) -> bool:
        """Whether attention probabilities are compared."""
        return self.on == "attentions" or self.last_attention


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the mean over positions and features of the squared difference of hidden states.

    Examples:
        >>> hidden_mse(torch.zeros(1, 2, 2), torch.ones(1, 2, 2), torch.tensor([[1, 0]]))
        tensor([1.])

    References:
        Jiao et al., TinyBERT, 2019, arXiv:1909.10351.
    """
    return _mean((student.float() - teacher.float()).square().mean(-1), mask)


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the mean over positions of one less the cosine of the hidden states.

    Examples:
        >>> hidden_cosine(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]]))
        tensor([1.])

    References:
        Sanh et al., DistilBERT, 2019, arXiv:1910.01108.
    """
    return _mean(1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1), mask)


def hidden_l1_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the mean over positions of `‖s − t‖₁ / D − log σ(cos(s, t))`.

    It is `log(1 + 1/e)`, not 0, at equality.

    Examples:
        >>> hidden_l1_cosine(torch.ones(1, 1, 4), torch.ones(1, 1, 4))
        tensor([0.3133])

    References:
        Chang et al., DistilHuBERT, 2021, arXiv:2110.01900, with λ = 1.
    """
    student, teacher = student.float(), teacher.float()
    cosine = F.cosine_similarity(student, teacher, dim=-1)
    return _mean((student - teacher).abs().mean(-1) - F.logsigmoid(cosine), mask)


def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the mean over pairs of positions of the squared difference of attention maps.

    Each model's map is the mean over its heads, so that the numbers of heads may differ. The mask
    is applied to queries and keys.

    Examples:
        >>> student = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
        >>> attention_mse(student, torch.full((1, 2, 2, 2), 0.5))
        tensor([0.2500])

    References:
        Jiao et al., TinyBERT, 2019, arXiv:1909.10351.
    """
    difference = (student.float().mean(1) - teacher.float().mean(1)).square()
    return _mean(_mean(difference, mask, pairs=True), mask)


def attention_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the mean over heads and queries of the KL of the attention distributions.

    In nats, for models with the same number of heads. A key whose probability in the student is
    exactly 0, for instance by dropout, is left out of both distributions. The mask is applied to
    queries.

    Examples:
        >>> teacher = torch.tensor([[[[0.75, 0.25]]]])
        >>> attention_kl(torch.full((1, 1, 1, 2), 0.5), teacher)
        tensor([0.1308])

    References:
        Wang et al., MiniLM, 2020, arXiv:2002.10957.
    """
    smallest = torch.finfo(torch.float32).tiny
    weights = [x.float() * (student > 0) for x in (teacher, student)]
    p, q = (x / x.sum(-1, keepdim=True).clamp_min(smallest) for x in weights)
    divergence = p * (p.clamp_min(smallest).log() - q.clamp_min(smallest).log())
    return _mean(divergence.sum(-1).mean(1), mask)


def relation_kl(student: Tensor, teacher: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Compute the KL of the relations `softmax(X Xᵀ / √d)` between positions.

    The features of queries, keys or values are split into `heads` relation heads, so that two
    models of different widths and numbers of heads can be compared.

    Args:
        student: Queries, keys or values of all heads, `[B, S, D]`.
        teacher: Likewise, of any width.
        heads: Number of relation heads; must divide both widths.
        mask: Applied to both positions of a pair.

    Returns:
        The mean over relation heads and positions, in nats.

    Raises:
        ValueError: If `heads` does not divide both widths.

    Examples:
        >>> x = torch.randn(1, 3, 4)
        >>> relation_kl(x, x, heads=2).abs() < 1e-6
        tensor([True])

    References:
        Wang et al., MiniLM, 2020, arXiv:2002.10957, for values; MiniLMv2, arXiv:2012.15828.
    """
    widths = student.shape[-1], teacher.shape[-1]
    if any(width % heads for width in widths):
        raise ValueError(
            f"{heads} relation heads do not divide the widths {widths[0]} of the student and "
            f"{widths[1]} of the teacher; set relation_heads to a divisor of both."
        )
    log_q, log_p = (_relations(x.float(), heads, mask) for x in (student, teacher))
    divergence = log_p.exp() * (log_p - log_q)
    if mask is not None:
        divergence = divergence.masked_fill(~mask.bool()[:, None, None, :], 0.0)
    return _mean(divergence.sum(-1).mean(1), mask)


def _relations(x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    by_head = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = by_head @ by_head.transpose(-1, -2) / by_head.shape[-1] ** 0.5
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask.bool()[:, None, None, :], lowest)
    return F.log_softmax(scores, dim=-1)


def _mean(values: Tensor, mask: Tensor | None, pairs: bool = False) -> Tensor:
    """Average the last axis over the positions that count."""
    if mask is None:
        return values.mean(-1)
    weight = mask.to(values.device, values.dtype)
    weight = weight[:, None] if pairs else weight
    return (values * weight).sum(-1) / weight.sum(-1).clamp_min(1)


FEATURE_LOSSES: dict[str, FeatureLoss] = {
    "hidden_mse": FeatureLoss(hidden_mse, on="hidden"),
    "hidden_cosine": FeatureLoss(hidden_cosine, on="hidden"),
    "hidden_l1_cosine": FeatureLoss(hidden_l1_cosine, on="hidden"),
    "attention": FeatureLoss(attention_mse, on="attentions"),
    "minilm": FeatureLoss(relation_kl, on="vectors", vectors=(2,), last_attention=True),
    "minilm_v2": FeatureLoss(relation_kl, on="vectors"),
}
"""The losses on features by their names in `DistillationConfig.feature_losses`."""
