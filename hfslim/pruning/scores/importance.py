"""Importance of units: the criteria as pure functions, and sums over examples and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import nn
from torch.nn import functional as F

from hfslim.anatomy.structure import Key
from hfslim.anatomy.units import Site, Units
from hfslim.training.objective import ProblemType
from hfslim.training.ranks import add_over_ranks, rank_count

EMPTY = "no examples were scored: the calibration data is empty, or has none of the classes"


class UnusableScoresError(ValueError):
    """There are no scores, or they are not finite."""

    @classmethod
    def not_finite(cls, subject: str) -> Self:
        """Return the error for a subject with its verb, such as `the scores of … are`."""
        return cls(
            f"{subject} not finite: check the model's weights and the calibration data for NaN and "
            "overflow"
        )


@dataclass
class Scores:
    """Importance of every unit, as sums over examples, which add up over ranks.

    Attributes:
        sums: Sum over examples by site, `[units]`, float64.
        count: Number of examples.
    """

    sums: dict[Key, torch.Tensor] = field(default_factory=dict)
    count: int = 0

    def mean(self) -> dict[Key, torch.Tensor]:
        """Return the mean over examples by site, `[units]`."""
        if not self.count:
            raise UnusableScoresError(EMPTY)
        for (kind, path), value in self.sums.items():
            if not torch.isfinite(value).all():
                raise UnusableScoresError.not_finite(f"the scores of the {kind} at {path!r} are")
        return {key: value / self.count for key, value in self.sums.items()}

    def add(self, site: Site, index: int, value: torch.Tensor) -> None:
        """Add to a site's sum: `[units]`, or `[1]` for the layer `index`."""
        total = self.sums[site.key]
        value = value.to("cpu", torch.float64)
        if site.kind == "layers":
            total[index] += value.sum()
        else:
            total += value

    def reduce(self) -> Scores:
        """Return the scores of all ranks together; the same on every rank."""
        if rank_count() == 1:
            return self
        keys = sorted(self.sums)
        count = torch.tensor([self.count], dtype=torch.float64)
        flat = add_over_ranks(torch.cat([count, *(self.sums[key] for key in keys)]))
        parts = flat.split([1, *(len(self.sums[key]) for key in keys)])
        return Scores(dict(zip(keys, parts[1:], strict=True)), round(parts[0].item()))


def fisher(gradient: torch.Tensor) -> torch.Tensor:
    """Sum the squared gradients of the gates, `[examples, units]` to `[units]`.

    Gradients are squared example by example; the square of a batch's gradient gives another
    ranking, because signs cancel. (Kwon et al. 2022, arXiv 2204.09656.)

    Examples:
        >>> fisher(torch.tensor([[1.0, -2.0], [-1.0, 3.0]]))
        tensor([ 2., 13.])
    """
    return gradient.square().sum(0)


def taylor(gradient: torch.Tensor) -> torch.Tensor:
    """Sum the absolute gradients of the gates, `[examples, units]` to `[units]`.

    (Michel et al. 2019, arXiv 1905.10650; `normalise` does their normalisation per layer.)

    Examples:
        >>> taylor(torch.tensor([[1.0, -2.0], [-1.0, 3.0]]))
        tensor([2., 5.])
    """
    return gradient.abs().sum(0)


def movement(gradient: torch.Tensor) -> torch.Tensor:
    """Sum `−∂L/∂gate`, `[examples, units]` to `[units]`; positive while weights move from zero.

    It equals `−Σ W · ∂L/∂W` over the unit's slice of the projection that follows. (Sanh et al.
    2020, arXiv 2005.07683, for whole units as in Lagunas et al. 2021, arXiv 2109.04838.)

    Examples:
        >>> movement(torch.tensor([[1.0, -2.0], [-1.0, 3.0]]))
        tensor([-0., -1.])
    """
    return -gradient.sum(0)


def fisher_factors(
    logits: torch.Tensor, problem: ProblemType, temperature: float = 1.0, outcomes: int = 8
) -> torch.Tensor:
    """Return scalars whose squared gradients add up to the Fisher information of the predictions.

    The divergence `KL_T` between a model's predictions and those with a gate ξ changed is 0 at
    ξ = 1, and so is its gradient. Its second derivative is the Fisher information
    `Σ_k (∂r_k/∂ξ)²` of the factors `r_k` returned here. For one class per example
    `r_k = T √p_k log p_k`, where `p = softmax(logits / T)` and the square root is a constant.

    Args:
        logits: `[examples, classes]`.
        problem: What the logits mean.
        temperature: T > 0; of no effect for regression.
        outcomes: Maximum number of factors, one backward pass each. With more classes, the least
            likely ones are merged into one outcome; of more independent labels, the most certain
            are left out. Regression returns all.

    Returns:
        `[examples, factors]`.

    Examples:
        >>> factors = fisher_factors(torch.zeros(1, 4), "single_label_classification")
        >>> [round(r, 4) for r in factors[0].tolist()]  # ½ · log ¼
        [-0.6931, -0.6931, -0.6931, -0.6931]
    """
    logits = logits.float()
    if problem == "regression":
        return logits * (2 / logits.shape[-1]) ** 0.5
    if problem == "multi_label_classification":
        yes = (logits.detach() / temperature).sigmoid()
        weight = (yes * (1 - yes) / logits.shape[-1]).sqrt()
        largest = weight.topk(min(outcomes, logits.shape[-1]), dim=-1).indices
        return (weight * logits).gather(-1, largest)
    log_p = F.log_softmax(logits / temperature, dim=-1)
    if log_p.shape[-1] > outcomes:
        largest = log_p.detach().topk(outcomes - 1, dim=-1).indices
        rest = log_p.scatter(-1, largest, float("-inf")).logsumexp(-1, keepdim=True)
        log_p = torch.cat([log_p.gather(-1, largest), rest], dim=-1)
    return temperature * log_p.detach().exp().sqrt() * log_p


def normalise(scores: Mapping[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
    """Divide each site's scores by their L2 norm, as Michel et al. (arXiv 1905.10650) per layer."""
    return {key: value / value.norm().clamp_min(1e-30) for key, value in scores.items()}


def activation(value: torch.Tensor, units: int) -> torch.Tensor:
    """Sum over examples the L2 norm of each unit's activations, to `[units]`.

    The value, `[examples, positions, units · width]`, is zero at padded positions; for a layer it
    is the contribution to the residual stream. (In the spirit of Minitron, arXiv 2407.14679.)

    Examples:
        >>> activation(torch.tensor([[[3.0, 1.0], [4.0, 0.0]]]), units=2)
        tensor([5., 1.])
    """
    squares = value.float().square().sum(1)
    return squares.reshape(len(value), units, -1).sum(-1).sqrt().sum(0)


def output_norm(
    value: torch.Tensor, projection: torch.Tensor, units: int, weight: torch.Tensor
) -> torch.Tensor:
    """Sum over examples the mean square of each unit's contribution to the residual stream.

    The result, `[units]`, is a mean over positions and features.

    (The representational knowledge of K-prune, Park et al. 2023, arXiv 2308.03449, who average over
    a head's width before the projection; here the head's whole output is projected.)

    Args:
        value: Input of the projection, `[examples, positions, units · width]`.
        projection: Its weight, `[features, units · width]`.
        units: Number of units.
        weight: `[examples, positions]`, 0 for padding, 1 elsewhere.

    Examples:
        >>> value = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]])
        >>> output_norm(value, torch.tensor([[2.0, 1.0], [0.0, 1.0]]), 2, torch.ones(1, 2))
        tensor([10.,  2.])
    """
    examples, positions, _ = value.shape
    value = value.float().reshape(examples, positions, units, -1)
    projection = projection.float().reshape(len(projection), units, -1)
    gram = torch.einsum("fuv,fuw->uvw", projection, projection) / len(projection)
    squares = torch.einsum("epuv,uvw,epuw->epu", value, gram, value)
    positions_of = weight.sum(1).clamp_min(1)
    return ((squares * weight.unsqueeze(-1)).sum(1) / positions_of.unsqueeze(-1)).sum(0)


def block_influence(
    before: torch.Tensor, after: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Sum over examples the mean of `1 − cos` between a layer's input and output, to `[1]`.

    Input and output are `[examples, positions, features]`; the weight, `[examples, positions]`, is
    0 for padding and 1 elsewhere. (ShortGPT, Men et al. 2024, arXiv 2403.03853.)

    Examples:
        >>> before = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
        >>> after = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])
        >>> block_influence(before, after, torch.ones(1, 2))
        tensor([0.5000])
    """
    distance = 1 - nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
    return ((distance * weight).sum(1) / weight.sum(1).clamp_min(1)).sum().reshape(1)


def magnitude(model: nn.Module, units: Units) -> dict[Key, torch.Tensor]:
    """Return the L2 norm of each unit's weight slices, in and out, `[units]` by site."""
    result: dict[Key, torch.Tensor] = {}
    for site in units:
        squares = torch.zeros(site.size, dtype=torch.float64)
        if site.kind == "layers":
            for index in range(site.size):
                for path in site.parts(index):
                    parameters = model.get_submodule(path).parameters()
                    squares[index] += sum(p.detach().double().square().sum() for p in parameters)
        for cut in site.cuts:
            tensor = getattr(model.get_submodule(cut.module), cut.tensor).detach().double()
            squares += cut.by_unit(tensor, site.size).square().sum(1).cpu()
        result[site.key] = squares.sqrt()
    return result


def random_scores(units: Units, seed: int) -> dict[Key, torch.Tensor]:
    """Return uniform random scores, as a control for other criteria."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site.key: torch.rand(site.size, generator=generator, dtype=torch.float64) for site in units
    }
