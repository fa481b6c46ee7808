"""Pure functions from scores of weights to zeros, unstructured or N:M.

Scores and zeros have the shape of the weight, `[out, in]` or `[out, in / groups, *kernel]`. Zeros
are bool, True where a weight is removed. A weight that was removed never comes back.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch

from hfslim.anatomy.weights import input_groups

Scope = Literal["global", "layer", "row"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
Tensors = Mapping[str, torch.Tensor]


class Pattern(NamedTuple):
    """At most `n` weights of each `m` consecutive inputs of an output are kept.

    (2:4: Mishra et al. 2021, arXiv 2104.08378.) The groups of a convolution lie along its input
    channels. An incomplete last group is padded with zeros.
    """

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse a text such as `2:4`; raise a ValueError on others.

        Examples:
            >>> Pattern.parse("2:4").sparsity
            0.5
        """
        found = re.fullmatch(r"(\d+):(\d+)", str(text))
        pattern = cls(*map(int, found.groups())) if found else cls(0, 0)
        if not 1 <= pattern.n < pattern.m:
            raise ValueError(
                f"pattern {text!r}: expected the form 'N:M', N weights kept of each M, such as "
                "'2:4' (in YAML with the quotes)"
            )
        return pattern

    @property
    def sparsity(self) -> float:
        """Fraction of weights removed."""
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


class SparsityGoal(NamedTuple):
    """The weights to remove: a fraction, or an N:M pattern with its fraction."""

    sparsity: float
    pattern: Pattern | None = None

    @classmethod
    def parse(cls, sparsity: float | None, pattern: str | None) -> SparsityGoal:
        """Parse the two arguments; raise a ValueError unless exactly one is given, in range."""
        if (sparsity is None) == (pattern is None):
            raise ValueError(
                "give either sparsity, the fraction of weights to remove, or pattern, such as "
                f"'2:4'; got sparsity={sparsity!r} and pattern={pattern!r}"
            )
        if pattern is not None:
            parsed = Pattern.parse(pattern)
            return cls(parsed.sparsity, parsed)
        assert sparsity is not None
        if not 0 < sparsity < 1:
            raise ValueError(f"sparsity is the fraction to remove, in (0, 1); got {sparsity}")
        return cls(sparsity)


def remove(
    scores: Tensors,
    zeros: Tensors,
    goal: SparsityGoal,
    scope: Scope = "global",
    progress: float = 1.0,
    initial: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Remove the weights of the lowest scores.

    Of equal scores the first in order are removed. Before a pattern is reached, only weights that
    it would remove by these scores are removed.

    Args:
        scores: Importance of each weight, by path.
        zeros: The weights that are removed already.
        goal: The weights to remove in the end.
        scope: The set within which weights compete for a fraction: the whole model, a layer, or the
            inputs of one output.
        progress: Progress towards the goal, from 0 to 1.
        initial: The fraction removed at progress 0.

    Returns:
        The removed weights, earlier and new ones.

    Examples:
        >>> scores = {"a": torch.tensor([[4.0, 1.0, 2.0, 3.0]])}
        >>> none = {"a": torch.zeros(1, 4, dtype=torch.bool)}
        >>> remove(scores, none, SparsityGoal.parse(None, "2:4"))["a"]
        tensor([[False,  True,  True, False]])
        >>> remove(scores, none, SparsityGoal.parse(0.25, None))["a"]
        tensor([[False,  True, False, False]])
    """
    ranked = {path: s.masked_fill(zeros[path], -math.inf) for path, s in scores.items()}
    fraction = initial + (goal.sparsity - initial) * progress
    if goal.pattern is not None:
        beyond = {path: outside(score, goal.pattern) for path, score in ranked.items()}
        if progress >= 1:
            return {path: beyond[path] | zeros[path] for path in ranked}
        ranked = {path: s.masked_fill(~beyond[path], math.inf) for path, s in ranked.items()}
    if scope == "global":
        sizes = [score.numel() for score in ranked.values()]
        flat = torch.cat([score.flatten() for score in ranked.values()])[None]
        parts = dict(zip(ranked, _lowest(flat, fraction)[0].split(sizes), strict=True))
    elif scope == "layer":
        parts = {path: _lowest(score.reshape(1, -1), fraction) for path, score in ranked.items()}
    else:
        parts = {path: _lowest(score.flatten(1), fraction) for path, score in ranked.items()}
    found = {path: parts[path].reshape(score.shape) for path, score in ranked.items()}
    if goal.pattern is not None:
        found = {path: some & beyond[path] for path, some in found.items()}
    return {path: some | zeros[path] for path, some in found.items()}


def digest(zeros: Tensors) -> str:
    """Return a hash of zeros, to compare those of two processes or of a checkpoint."""
    sha = hashlib.sha256()
    for path in sorted(zeros):
        sha.update(path.encode())
        sha.update(np.packbits(zeros[path].cpu().numpy()).tobytes())
    return sha.hexdigest()[:16]


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the lowest scores of each row, `[rows, weights]`; of equal ones the first."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    below, equal = scores < threshold, scores == threshold
    short = count - below.sum(1, keepdim=True)
    return below | (equal & (equal.cumsum(1) <= short))


def outside(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Mark the M − N lowest scores of each group."""
    groups = input_groups(scores, pattern.m, -math.inf)
    last = groups.argsort(stable=True, dim=-1)[..., : pattern.m - pattern.n]
    marked = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, last, True)
    return marked.flatten(-2)[..., : scores.shape[1]].movedim(-1, 1)


def _lowest(scores: torch.Tensor, fraction: float) -> torch.Tensor:
    return lowest(scores, round(fraction * scores.shape[1]))
