"""A teacher's largest logits, and one number for all others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TopK"]


@dataclass(frozen=True)
class TopK:
    """What is kept of logits: those of the k likeliest classes, and how likely the rest is.

    The other classes share one logit, so that at `temperature` they are together as probable as
    the teacher finds them: the k probabilities are the teacher's own, and the student is taught how
    much is left, not how it is spread. Probabilities that are normalised over k classes alone would
    be too large, and would teach the student to be too sure (Anshumann et al. 2025, arXiv
    2503.16870).

    Attributes:
        k: Number of classes, from 1 to one less than there are.
        temperature: At which the probabilities are right.
    """

    k: int
    temperature: float

    def keep(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Take the largest logits.

        Args:
            logits: `[batch, classes]`.

        Returns:
            `[batch, k + 1]` float32, the largest logits and then that of each other class; and the
            classes of the largest, `[batch, k]` int32.

        Examples:
            >>> values, classes = TopK(1, 1.0).keep(torch.tensor([[0.5, 0.2, 0.3]]).log())
            >>> values.exp(), classes
            (tensor([[0.5000, 0.2500]]), tensor([[0]], dtype=torch.int32))
        """
        logits = logits.float()
        largest = logits.topk(self.k, dim=-1)
        rest = logits.scatter(-1, largest.indices, -torch.inf) / self.temperature
        share = rest.logsumexp(-1, keepdim=True) - math.log(logits.shape[-1] - self.k)
        return torch.cat([largest.values, share * self.temperature], -1), largest.indices.int()

    @staticmethod
    def fill(values: Tensor, classes: Tensor, number: int) -> Tensor:
        """Return logits for all classes, `[batch, number]`, from what `keep` returned.

        Examples:
            >>> TopK.fill(torch.tensor([[2.0, -1.0]]), torch.tensor([[1]], dtype=torch.int32), 3)
            tensor([[-1.,  2., -1.]])
        """
        whole = values[:, -1:].repeat(1, number)
        return whole.scatter_(-1, classes.long(), values[:, :-1])
