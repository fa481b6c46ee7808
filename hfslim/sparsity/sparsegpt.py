"""SparseGPT: removal of single weights of a layer, with updates of the others."""

from __future__ import annotations

import math
from itertools import groupby

import torch

from hfslim.sparsity.weight_masks import SparsityGoal, lowest, outside

BLOCK = 128
"""Columns within which weights compete for a fraction; then all later columns are updated."""


def sparsegpt(
    weight: torch.Tensor,
    second: torch.Tensor,
    zeros: torch.Tensor,
    goal: SparsityGoal,
    channels: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove weights of a layer `y = W x`, column by column.

    Column `j` costs `w_j² / [A_j]_00`, where `A_j` is the inverse of the second moments of the
    columns from `j` on, which are updated by `−w_j / [A_j]_00 · [A_j]_0`, the step of Optimal Brain
    Surgeon. All rows share the inverses, which follow from the rows of one Cholesky factor.
    (Frantar and Alistarh 2023, arXiv 2301.00774.)

    Args:
        weight: `W`, `[outputs, inputs]`, float64.
        second: Second moments of the inputs, positive definite, `[inputs, inputs]`.
        zeros: The weights that are removed already.
        goal: How many to remove. For a fraction, weights compete within a block of columns.
        channels: Number of inputs after which the groups of a pattern restart.

    Returns:
        The new weights, and a mask of the removed ones.

    Examples:
        The second input is nearly a copy of the first, whose removal costs little:

        >>> second = torch.tensor([[1.01, 1.0, 0.0], [1.0, 1.01, 0.0], [0.0, 0.0, 1.0]]).double()
        >>> weight = torch.tensor([[2.0, 2.0, 2.0]]).double()
        >>> new, zeros = sparsegpt(weight, second, weight == 0, SparsityGoal(0.34), 3)
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
            zeros[:, start:stop] |= _removed(scores, goal, start, stop)
            for j in range(start, stop):
                errors.append(weight[:, j].masked_fill(~zeros[:, j], 0) / factor[j, j])
                weight[:, j:end] -= torch.outer(errors[-1], factor[j, j:end])
        weight[:, end:] -= torch.stack(errors, 1) @ factor[begin:end, end:]
    return weight.masked_fill(zeros, 0), zeros


def _blocks(columns: int, goal: SparsityGoal, channels: int) -> list[list[tuple[int, int]]]:
    """Divide the columns into blocks, and these into ranges that are decided at once."""
    if goal.pattern is None:
        return [[(i, min(i + BLOCK, columns))] for i in range(0, columns, BLOCK)]
    ranges = [
        (i, min(i + goal.pattern.m, first + channels))
        for first in range(0, columns, channels)
        for i in range(first, first + channels, goal.pattern.m)
    ]
    return [list(block) for _, block in groupby(ranges, lambda one: one[0] // BLOCK)]


def _removed(scores: torch.Tensor, goal: SparsityGoal, start: int, stop: int) -> torch.Tensor:
    """Mark the weights to remove in some columns; over all columns the fraction is exact."""
    if goal.pattern is not None:
        return outside(scores, goal.pattern)
    before, after = (round(goal.sparsity * len(scores) * column) for column in (start, stop))
    return lowest(scores.reshape(1, -1), after - before).reshape(scores.shape)
