"""Remove single weights of a projection while those that stay make up for them."""

from __future__ import annotations

import math
from itertools import groupby

import torch

from hfslim.sparsity.weight_masks import Goal, lowest, outside

BLOCK = 128
"""Columns within which weights compete for a fraction, and after which all others are updated."""


def sparsegpt(
    weight: torch.Tensor,
    second: torch.Tensor,
    zeros: torch.Tensor,
    goal: Goal,
    channels: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove weights of a projection `y = W x`, column by column.

    Column `j` costs `w_j² / [A_j]_00`, where `A_j` is the inverse of the second moments of the
    columns from `j` on; these make up for it by `−w_j / [A_j]_00 · [A_j]_0`, the step of Optimal
    Brain Surgeon. All rows share the inverses, which are the rows of one Cholesky factor.
    (Frantar and Alistarh 2023, arXiv 2301.00774.)

    Args:
        weight: `W`, `[outputs, inputs]`, float64.
        second: Second moments of the inputs, positive definite, `[inputs, inputs]`.
        zeros: The weights that are removed already.
        goal: How many to remove. Those of a block of columns compete for a fraction.
        channels: Inputs after which the groups of a pattern begin anew.

    Returns:
        The new weights, and where they are removed.

    Examples:
        The second input is nearly a copy of the first, which goes for free:

        >>> second = torch.tensor([[1.01, 1.0, 0.0], [1.0, 1.01, 0.0], [0.0, 0.0, 1.0]]).double()
        >>> weight = torch.tensor([[2.0, 2.0, 2.0]]).double()
        >>> new, zeros = sparsegpt(weight, second, weight == 0, Goal(0.34), 3)
        >>> [round(w, 2) for w in new[0].tolist()], zeros.tolist()
        ([0.0, 3.98, 2.0], [[True, False, False]])
    """
    weight, zeros = weight.masked_fill(zeros, 0), zeros.clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(second))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for block in _blocks(weight.shape[1], goal, channels):
        begin, end = block[0][0], block[-1][1]
        errors = []
        for start, stop in block:
            scores = (weight[:, start:stop] / factor.diagonal()[start:stop]).square()
            scores = scores.masked_fill(zeros[:, start:stop], -math.inf)
            zeros[:, start:stop] |= _go(scores, goal, start, stop)
            for j in range(start, stop):
                errors.append(weight[:, j].masked_fill(~zeros[:, j], 0) / factor[j, j])
                weight[:, j:end] -= torch.outer(errors[-1], factor[j, j:end])
        weight[:, end:] -= torch.stack(errors, 1) @ factor[begin:end, end:]
    return weight.masked_fill(zeros, 0), zeros


def _blocks(columns: int, goal: Goal, channels: int) -> list[list[tuple[int, int]]]:
    """Part the columns into blocks, and these into the ranges that are decided at once."""
    if goal.pattern is None:
        return [[(i, min(i + BLOCK, columns))] for i in range(0, columns, BLOCK)]
    ranges = [
        (i, min(i + goal.pattern.m, first + channels))
        for first in range(0, columns, channels)
        for i in range(first, first + channels, goal.pattern.m)
    ]
    return [list(block) for _, block in groupby(ranges, lambda one: one[0] // BLOCK)]


def _go(scores: torch.Tensor, goal: Goal, start: int, stop: int) -> torch.Tensor:
    """Mark the weights of some columns that go; over all columns the fraction is exact."""
    if goal.pattern is not None:
        return outside(scores, goal.pattern)
    before, after = (round(goal.sparsity * len(scores) * column) for column in (start, stop))
    return lowest(scores.reshape(1, -1), after - before).reshape(scores.shape)
