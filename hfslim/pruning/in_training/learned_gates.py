"""Gates that are learned beside the weights, with a Lagrangian for the target.

(L0: Louizos et al. 2018, arXiv 1712.01312; structured, with a Lagrangian: CoFi, Xia et al. 2022,
arXiv 2204.00408.)
"""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from hfslim.anatomy.structure import Key
from hfslim.pruning.gates.gates import Gates
from hfslim.pruning.in_training.expected_cost import ExpectedCost
from hfslim.pruning.scores.importance import UnusableScoresError
from hfslim.pruning.target import Target
from hfslim.training.ranks import add_over_ranks, rank_count

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
"""β, γ and ζ of Louizos et al."""
OPEN = 0.95
"""Initial probability of each gate to be open, before stretching."""
WARM_UP = 0.7
"""Part of the time in which the limit decreases to the target; then the gates settle."""
TRAVEL = 40.0
"""The distance that log α can travel by steps of Adam in one direction."""
MULTIPLIERS = (0.0, 100.0)
"""Initial λ₁ and λ₂: λ₂ keeps the expected cost near its limit until λ₁ has converged."""
MULTIPLIER_RATE = 0.1
"""Learning rate of the multipliers, as a fraction of that of log α."""


def stretched(logits: torch.Tensor) -> torch.Tensor:
    """Return `min(1, max(0, σ(x) · (ζ − γ) + γ))`: a gate that reaches 0 and 1.

    Examples:
        >>> stretched(torch.tensor([-3.0, 0.0, 3.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return (logits.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def hard_concrete(log_alpha: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw gates, `stretched((log u − log(1 − u) + log α) / β)`."""
    return stretched((noise.logit() + log_alpha) / TEMPERATURE)


def presence(log_alpha: torch.Tensor) -> torch.Tensor:
    """Return the probability that a drawn gate is not 0, `σ(log α − β log(−γ / ζ))`."""
    return (log_alpha - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid()


class LearnedGates:
    """Hard-concrete gates on a model's units, the Lagrangian, and the optimizer of both.

    Each optimizer step multiplies every unit by a gate drawn from (seed, step), the same on every
    process. The training loss plus `λ₁ · gap + λ₂ · gap²` is minimised over log α and maximised
    over λ₁ and λ₂; the gap is the expected cost minus its limit, as a fraction of the whole
    model's cost.

    Attributes:
        drawn: Whether the units are multiplied by drawn gates now.
    """

    def __init__(self, gates: Gates, cost: ExpectedCost, seed: int, steps: int) -> None:
        self.gates, self.cost, self.seed = gates, cost, seed
        self.drawn = False
        self._keys: list[Key] = [site.key for site in gates.units]
        self._sizes = [site.size for site in gates.units]
        self._fixed = torch.zeros(sum(self._sizes), dtype=torch.bool)
        for site, part in zip(gates.units, self._fixed.split(self._sizes), strict=True):
            part[list(site.fixed)] = True
        start = math.log(OPEN / (1 - OPEN))
        self._log_alpha = torch.full((len(self._fixed),), start, requires_grad=True)
        first = torch.tensor(MULTIPLIERS)[:, None]
        self._multipliers = first.repeat(1, len(cost.names)).requires_grad_()
        rate = min(TRAVEL / steps, 1.0)
        groups: list[dict[str, Any]] = [
            {"params": [self._log_alpha], "lr": rate},
            {"params": [self._multipliers], "lr": MULTIPLIER_RATE * rate, "maximize": True},
        ]
        self._optimizer = torch.optim.Adam(groups, eps=1e-12)

    def draw(self, step: int) -> None:
        """Multiply the units by gates drawn for an optimizer step, until `use_means`."""
        uniform = np.random.default_rng([self.seed, step]).random(len(self._fixed))
        noise = torch.from_numpy(uniform).clamp(1e-6, 1 - 1e-6).float()
        self._sample = self._whole(hard_concrete(self._log_alpha, noise))
        self._leaves = [
            part.detach().to(device=self._device).requires_grad_()
            for part in self._sample.split(self._sizes)
        ]
        self.gates.factors = dict(zip(self._keys, self._leaves, strict=True))
        self.drawn = True

    def learn(self, target: Target) -> None:
        """Update log α, by the gradients of all processes, and the multipliers for a target."""
        parts = [torch.zeros_like(x) if x.grad is None else x.grad for x in self._leaves]
        gradient = add_over_ranks(torch.cat(parts))
        gradient /= rank_count()
        gradient = gradient.cpu()
        for (kind, path), part in zip(self._keys, gradient.split(self._sizes), strict=True):
            if not part.isfinite().all():
                raise UnusableScoresError(
                    f"the gradients of the gates of the {kind} at {path!r} are not finite: "
                    "training has diverged; lower the learning rate"
                )
        self._optimizer.zero_grad()
        gap = self.cost.kept(self.present()) - self.cost.limits(target)
        linear, square = self._multipliers
        penalty = (linear * gap + square * gap.square()).sum()
        torch.autograd.backward([self._sample, penalty], [gradient, None])
        self._optimizer.step()

    def use_means(self) -> None:
        """Multiply the units by the gates without noise, `stretched(log α)`."""
        self.drawn = False
        with torch.no_grad():
            means = self._whole(stretched(self._log_alpha)).to(self._device)
        self.gates.factors = dict(zip(self._keys, means.split(self._sizes), strict=True))

    def present(self) -> dict[Key, torch.Tensor]:
        """Return the probability that each unit is present, `[units]` by site, float64."""
        whole = self._whole(presence(self._log_alpha.double()))
        return dict(zip(self._keys, whole.split(self._sizes), strict=True))

    def scores(self) -> dict[Key, torch.Tensor]:
        """Return the scores of the final decision, `[units]` by site."""
        with torch.no_grad():
            return self.cost.scores(self.present())

    def expected(self) -> dict[str, float]:
        """Return the expected fraction that is kept of each limited figure."""
        with torch.no_grad():
            return dict(zip(self.cost.names, self.cost.kept(self.present()).tolist(), strict=True))

    def state(self) -> str:
        """Return parameters and optimizer state as text."""
        tensors = {}
        for name, parameter in self._parameters.items():
            tensors[name] = parameter.detach()
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{name}.{key}"] = value
        return base64.b64encode(save(tensors)).decode()

    def restore(self, state: str) -> None:
        """Restore the result of `state`, exactly."""
        tensors = load(base64.b64decode(state))
        for name, parameter in self._parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors.pop(name))
            for key in [key for key in tensors if key.startswith(f"{name}.")]:
                self._optimizer.state[parameter][key.rpartition(".")[2]] = tensors[key]

    @property
    def _parameters(self) -> dict[str, torch.Tensor]:
        return {"log_alpha": self._log_alpha, "multipliers": self._multipliers}

    @property
    def _device(self) -> torch.device:
        return next(self.gates.model.parameters()).device

    def _whole(self, values: torch.Tensor) -> torch.Tensor:
        """Set the values of fixed units to 1."""
        return torch.where(self._fixed, values.new_ones(()), values)
