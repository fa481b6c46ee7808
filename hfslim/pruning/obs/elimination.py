"""Remove units one by one at the least cost while the others make up for them.

Optimal Brain Surgeon (Hassibi and Stork 1993) for whole units of a projection `y = W x`, as in
ZipLM (Kurtic et al. 2023, arXiv 2302.04089), with the error measured by the curvature of the loss
in the outputs, as in LLM Surgeon (van der Ouderaa et al. 2023, arXiv 2312.17244).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

PANEL = 64
"""Columns of updates that are gathered before the matrices change."""


def eliminate(around: Sequence[Elimination]) -> tuple[list[int], torch.Tensor]:
    """Find the order in which units go, always the one that costs least.

    Args:
        around: The projections that take them, one or several; they are used up.

    Returns:
        The units, the first to go first, and what each adds to the sum of the errors, `[units]`.

    Examples:
        Two inputs are copies of one another but for a little noise, so one of them goes for free:

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
        price = sum(one.prices() for one in around)
        assert isinstance(price, torch.Tensor)
        unit = int(price.masked_fill(gone, float("inf")).argmin())
        costs.append(price[unit])
        order.append(unit)
        gone[unit] = True
        for one in around:
            one.remove(unit)
    return order, torch.stack(costs)


class Elimination:
    """A projection that loses its units one by one while the others make up for them.

    Removing the columns `S` of `W`, with the best change of the others, costs
    `tr((A_SS)⁻¹ B_SS)`, where `A = H⁻¹` and `B = Wᵀ G W`. Then `A` becomes
    `A − A_S (A_SS)⁻¹ A_Sᵀ` and `W` becomes `W − W_S (A_SS)⁻¹ A_Sᵀ`; of `W` only `B` is needed.

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

    def prices(self) -> torch.Tensor:
        """Return what each unit would cost now, `[units]`; of those that are gone, anything."""
        price = self.a.new_zeros(self.size)
        price[self.units] = _traces(self.blocks_a, self.blocks_b)
        return price

    def remove(self, unit: int) -> None:
        """Let a unit go."""
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
        """Change the matrices by what is pending, and leave out what is gone."""
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
    """Solve for the weights that keep a projection's output best when some inputs are gone.

    The least squares solution `W H_{:,K} (H_KK)⁻¹`, which equals the sum of all OBS updates.
    Weights that are zero stay zero, and a row with some is solved for by itself.

    Args:
        weight: `W`, `[outputs, inputs]`.
        second: `H`, second moments of the inputs, positive definite, `[inputs, inputs]`.
        kept: Numbers of the inputs that stay, `[kept]`.

    Returns:
        The weights, 0 where they were and where the input is gone, `[outputs, inputs]`.

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
    """Solve for one factor per kept unit that keeps a projection's output best.

    Least squares over the units' outputs `W_u x_u`, which need not be seen: their inner products
    follow from `W` and `H`. (Kwon et al. 2022, arXiv 2204.09656, section 4.3.)

    Args:
        weight: `W`, `[outputs, inputs]`.
        second: `H`, second moments of the inputs, `[inputs, inputs]`.
        kept: Numbers of the units that stay.
        width: Inputs per unit.

    Returns:
        The factors, `[kept]`.

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
