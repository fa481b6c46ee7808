"""Gates that are learned beside the weights, under a Lagrangian that meets a target.

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

from hfslim.pruning.gates.gates import Gates, Key
from hfslim.pruning.in_training.expected_cost import ExpectedCost
from hfslim.pruning.scores.importance import UnusableScoresError
from hfslim.pruning.target import Target
from hfslim.training.ranks import add_over_ranks, rank_count

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
"""β, γ and ζ of Louizos et al."""
OPEN = 0.95
"""How likely each gate is to pass its unit at first, before it is stretched."""
WARM_UP = 0.7
"""Part of the time in which the limit comes down to the target; in the rest the gates settle."""
TRAVEL = 40.0
"""How far a log α could go at the steps of Adam, if all led the same way."""
MULTIPLIERS = (0.0, 100.0)
"""λ₁ and λ₂ at first: λ₂ keeps the expected cost near its limit until λ₁ has found its value."""
MULTIPLIER_RATE = 0.1
"""Step of the multipliers, as a part of that of log α."""


def stretched(logits: torch.Tensor) -> torch.Tensor:
    """Return `min(1, max(0, σ(x) · (ζ − γ) + γ))`: a gate that can be quite open or quite closed.

    Examples:
        >>> stretched(torch.tensor([-3.0, 0.0, 3.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return (logits.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def hard_concrete(log_alpha: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw gates, `stretched((log u − log(1 − u) + log α) / β)`.

    Args:
        log_alpha: log α of each gate.
        noise: u of each, in (0, 1).
    """
    return stretched((noise.logit() + log_alpha) / TEMPERATURE)


def presence(log_alpha: torch.Tensor) -> torch.Tensor:
    """Return how likely a drawn gate is not quite closed, `σ(log α − β log(−γ / ζ))`."""
    return (log_alpha - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid()


class LearnedGates:
    """Hard-concrete gates on a model's units, their Lagrangian and the optimizer of both.

    Each optimizer step multiplies every unit by a gate drawn from (seed, step), the same on every
    process. The loss that is trained on, plus `λ₁ · gap + λ₂ · gap²`, moves log α down its gradient
    and λ₁, λ₂ up theirs; the gap is what the expected cost exceeds its limit by, as a fraction of
    the whole model's.

    Args:
        gates: The gates of the model.
        cost: What the model is expected to cost.
        seed: Seed of the draws.
        steps: How many optimizer steps there are to learn in.

    Attributes:
        drawn: Whether drawn gates are in the model at this moment.
    """

    def __init__(self, gates: Gates, cost: ExpectedCost, seed: int, steps: int) -> None:
        self.gates, self.cost, self.seed = gates, cost, seed
        self.drawn = False
        self._keys: list[Key] = [(site.kind, site.path) for site in gates.units]
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
        """Multiply the units by gates drawn for an optimizer step, until `rest`."""
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
        """Step log α by the gradients of all processes, and the multipliers.

        Args:
            target: What the model may cost at this moment.

        Raises:
            UnusableScoresError: A gradient is not finite.
        """
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

    def rest(self) -> None:
        """Multiply the units by what the gates are without noise, `stretched(log α)`."""
        self.drawn = False
        with torch.no_grad():
            calm = self._whole(stretched(self._log_alpha)).to(self._device)
        self.gates.factors = dict(zip(self._keys, calm.split(self._sizes), strict=True))

    def present(self) -> dict[Key, torch.Tensor]:
        """Return how likely each unit is to be there, `[units]` by site, float64."""
        whole = self._whole(presence(self._log_alpha.double()))
        return dict(zip(self._keys, whole.split(self._sizes), strict=True))

    def scores(self) -> dict[Key, torch.Tensor]:
        """Return what to decide by, `[units]` by site."""
        with torch.no_grad():
            return self.cost.scores(self.present())

    def expected(self) -> dict[str, float]:
        """Return the expected fraction that is kept of each figure that the target names."""
        with torch.no_grad():
            return dict(zip(self.cost.names, self.cost.kept(self.present()).tolist(), strict=True))

    def state(self) -> str:
        """Return all that has been learned, as text; `restore` takes it up exactly."""
        tensors = {}
        for name, parameter in self._parameters.items():
            tensors[name] = parameter.detach()
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{name}.{key}"] = value
        return base64.b64encode(save(tensors)).decode()

    def restore(self, state: str) -> None:
        """Go on from what `state` returned."""
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
        """Put 1 where a unit has to stay."""
        return torch.where(self._fixed, values.new_ones(()), values)
