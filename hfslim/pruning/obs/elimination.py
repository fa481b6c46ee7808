"""Elimination of units one by one at the least cost, with updates of the remaining weights.

Optimal Brain Surgeon (Hassibi and Stork 1993) for whole units of a layer `y = W x`, as in
ZipLM (Kurtic et al. 2023, arXiv 2302.04089), with the error measured by the curvature of the loss
in the outputs, as in LLM Surgeon (van der Ouderaa et al. 2023, arXiv 2312.17244).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

PANEL = 64
"""Columns of updates that are collected before the matrices are updated."""


def eliminate(around: Sequence[Elimination]) -> tuple[list[int], torch.Tensor]:
    """Remove all units in order of least cost.

    Returns the units in order of removal, and the cost of each, `[units]`. The layers that take the
    units, one or several, cannot be used again.

    Examples:
        Two inputs are equal but for a little noise, so the removal of one of them costs little:

        >>> second = torch.tensor([[1.01, 1.0, 0.0], [1.0, 1.01, 0.0], [0.0, 0.0, 1.0]]).double()
        >>> order, costs = eliminate([Elimination(second, torch.ones(3, 3).double())])
        >>> order, [round(c, 3) for c in costs.tolist()]
        ([0, 2, 1], [0.02, 1.0, 4.0])
    """
    size = around[0].size
    gone = torch.zeros(size, dtype=torch.bool, device=around[0].units.device)
    order: list[int] = []
    costs = []
    for _ in range(size):
        cost = sum(one.costs() for one in around)
        assert isinstance(cost, torch.Tensor)
        unit = int(cost.masked_fill(gone, float("inf")).argmin())
        costs.append(cost[unit])
        order.append(unit)
        gone[unit] = True
        for one in around:
            one.remove(unit)
    return order, torch.stack(costs)


class Elimination:
    """A layer whose units are removed one by one, with the optimal update of the others.

    Removing the columns `S` of `W` costs `tr((A_SS)⁻¹ B_SS)`, where `A = H⁻¹` and `B = Wᵀ G W`.
    Then `A` becomes `A − A_S (A_SS)⁻¹ A_Sᵀ` and `W` becomes `W − W_S (A_SS)⁻¹ A_Sᵀ`. Only `B` is
    needed, not `W`.

    Args:
        second: `H`, second moments of the inputs, positive definite, `[units · width]²`, float64.
        metric: `B`, the same shape.
        width: Inputs per unit.
    """

    def __init__(self, second: torch.Tensor, metric: torch.Tensor, width: int = 1) -> None:
        self.size, self.width = len(second) // width, width
        self.a, self.b = torch.cholesky_inverse(torch.linalg.cholesky(second)), metric
        self.blocks_a = _diagonal_blocks(self.a, width)
        self.blocks_b = _diagonal_blocks(self.b, width)
        self.units = torch.arange(self.size, device=self.a.device)
        self.gone = torch.zeros(self.size, dtype=torch.bool, device=self.a.device)
        self.pending = self.a.new_empty(3, len(self.a), max(PANEL // width, 1) * width)
        self.filled = 0

    def costs(self) -> torch.Tensor:
        """Return the cost of each unit's removal now, `[units]`; undefined for removed units."""
        costs = self.a.new_zeros(self.size)
        costs[self.units] = _traces(self.blocks_a, self.blocks_b)
        return costs

    def remove(self, unit: int) -> None:
        """Remove a unit."""
        unit = int((self.units == unit).nonzero())
        width, filled = self.width, self.filled
        self.gone[unit] = True
        here = slice(unit * width, (unit + 1) * width)
        change, of_a, of_b = self.pending[:, :, :filled]
        a_s = self.a[:, here] - change @ of_a[here].T
        b_s = self.b[:, here] - change @ of_b[here].T - of_b @ change[here].T
        step = a_s @ torch.linalg.inv(a_s[here])
        half = b_s - step @ b_s[here] / 2
        self.pending[:, :, filled : filled + width] = torch.stack([step, a_s, half])
        self.filled += width
        by_unit = [x.reshape(-1, width, width) for x in (step, a_s, half)]
        self.blocks_a = self.blocks_a - by_unit[0] @ by_unit[1].mT
        twice = by_unit[0] @ by_unit[2].mT
        self.blocks_b = self.blocks_b - twice - twice.mT
        self.blocks_a[self.gone] = torch.eye(width, dtype=self.a.dtype, device=self.a.device)
        if self.filled == self.pending.shape[2]:
            self._compress()

    def _compress(self) -> None:
        """Apply the pending updates to the matrices, and drop the removed units."""
        left = ~self.gone
        columns = left.repeat_interleave(self.width).nonzero().flatten()
        a, b = (m.index_select(0, columns).index_select(1, columns) for m in (self.a, self.b))
        change, of_a, of_b = self.pending.index_select(1, columns)
        self.a = a.addmm_(change, of_a.T, alpha=-1)
        self.b = b.addmm_(torch.cat([change, of_b], 1), torch.cat([of_b, change], 1).T, alpha=-1)
        self.blocks_a, self.blocks_b = self.blocks_a[left], self.blocks_b[left]
        self.units, self.gone = self.units[left], self.gone[left]
        self.pending = self.pending[:, : len(a)].clone()
        self.filled = 0


def refit(weight: torch.Tensor, second: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the weights that best preserve a layer's output without some of its inputs.

    The least squares solution `W H_{:,K} (H_KK)⁻¹`, which equals the sum of all OBS updates.
    Weights that are zero stay zero; a row with zeros is solved separately.

    Args:
        weight: `W`, `[outputs, inputs]`; the shape of the result, which is 0 at removed inputs.
        second: `H`, second moments of the inputs, positive definite, `[inputs, inputs]`.
        kept: Indices of the remaining inputs, `[kept]`.

    Examples:
        >>> second = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
        >>> refit(torch.tensor([[3.0, 1.0]]), second, torch.tensor([0]))
        tensor([[4., 0.]])
    """
    result = torch.zeros_like(weight)
    target = weight @ second
    sparse = (weight[:, kept] == 0).any(1)
    whole = (~sparse).nonzero()
    if len(kept) and len(whole):
        solved = torch.linalg.solve(second[kept][:, kept], target[whole, kept].T).T
        result[whole, kept] = solved
    for row in sparse.nonzero().flatten():
        own = kept[weight[row, kept] != 0]
        result[row, own] = torch.linalg.solve(second[own][:, own], target[row, own])
    return result


def rescale(
    weight: torch.Tensor, second: torch.Tensor, kept: torch.Tensor, width: int = 1
) -> torch.Tensor:
    """Return one factor per kept unit that best preserves a layer's output.

    Least squares over the units' outputs `W_u x_u`, whose inner products follow from `W` and `H`.
    (Kwon et al. 2022, arXiv 2204.09656, section 4.3.)

    Args:
        weight: `W`, `[outputs, inputs]`.
        second: `H`, second moments of the inputs, `[inputs, inputs]`.
        kept: Indices of the remaining units; the factors are `[kept]`.
        width: Inputs per unit.

    Examples:
        >>> second = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
        >>> rescale(torch.tensor([[3.0, 1.0]]), second, torch.tensor([0]))
        tensor([1.3333])
    """
    units = len(second) // width
    products = (weight.T @ weight * second).reshape(units, width, units, width).sum((1, 3))
    return torch.linalg.solve(products[kept][:, kept], products[kept].sum(1))


def _diagonal_blocks(matrix: torch.Tensor, width: int) -> torch.Tensor:
    units = len(matrix) // width
    blocks = matrix.reshape(units, width, units, width)
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).clone()


def _traces(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.shape[-1] == 1:
        return (b / a).flatten()
    return torch.linalg.solve(a, b).diagonal(dim1=1, dim2=2).sum(-1)
