"""Second moments around the projections that units feed: what removing units and mending needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import nn
from transformers import PreTrainedModel

from hfslim.anatomy import Site, Units
from hfslim.objective import ProblemType, logits_of, problem_type
from hfslim.prune.collect import frozen
from hfslim.prune.gates import Gates, Key
from hfslim.prune.importance import UnusableScoresError, divergence_roots
from hfslim.timing import evaluating, placed

RIDGE = 1e-2
"""Added to the diagonal of second moments, as a fraction of its mean."""


@dataclass
class Moments:
    """Sums over positions around a projection `y = W x + b`, so that batches and ranks add theirs.

    A position counts by `‖g‖²`, where `g` is the gradient of `decision_roots` at `y`: by how much
    the decision listens there. Padding gets no gradient, so it counts nothing.

    Attributes:
        weight: `Σ ‖g‖²`, `[]`.
        first: `Σ ‖g‖² x`, `[inputs]`.
        second: `Σ ‖g‖² x xᵀ`, `[inputs, inputs]`.
        outer: `Σ g gᵀ`, `[outputs, outputs]`.
        examples: Number of examples, `[]`.
    """

    weight: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    outer: torch.Tensor
    examples: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Moments:
        """Return the sums over nothing around a projection with a weight `[outputs, inputs]`."""
        outputs, inputs = weight.shape
        shapes = ((), (inputs,), (inputs, inputs), (outputs, outputs), ())
        return cls(*(torch.zeros(s, dtype=torch.float64, device=weight.device) for s in shapes))

    def add(self, x: torch.Tensor, g: torch.Tensor) -> None:
        """Add positions: inputs `[positions, inputs]`, gradients `[positions, outputs]`."""
        x, g = x.float(), g.float()
        listens = g.square().sum(-1)
        weighted = x * listens.unsqueeze(-1)
        self.weight += listens.sum(dtype=torch.float64)
        self.first += weighted.sum(0, dtype=torch.float64)
        self.second += weighted.T @ x
        self.outer += g.T @ g

    def reduce(self) -> None:
        """Add up those of all ranks."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for total in vars(self).values():
                torch.distributed.all_reduce(total)

    def covariance(self, centred: bool) -> torch.Tensor:
        """Return mean second moments with a ridge, `[inputs, inputs]`; about the mean if centred.

        Where a projection has a bias, the bias makes up for the mean of what is removed.
        """
        weight = self.weight.clamp_min(1e-300)
        second = self.second / weight
        if centred:
            second = second - torch.outer(self.first, self.first) / weight.square()
        ridge = RIDGE * second.diagonal().mean().clamp_min(1e-30)
        return (second + second.T) / 2 + ridge * torch.eye(
            len(second), dtype=second.dtype, device=second.device
        )

    @property
    def mean(self) -> torch.Tensor:
        """Mean input, `[inputs]`."""
        return self.first / self.weight.clamp_min(1e-300)


def gather(
    model: PreTrainedModel,
    units: Units,
    batches: Iterable[Mapping[str, Any]],
    progress: bool = True,
) -> dict[Key, Moments]:
    """Sum second moments around the projections behind heads and neurons, in one pass over data.

    No labels are needed, and the model is not changed.

    Args:
        model: The model, not a wrapper.
        units: Sites of heads and neurons.
        batches: Model inputs; labels are passed over.
        progress: Whether to show a progress bar.

    Returns:
        The sums over the examples of all ranks, by site.

    Raises:
        UnusableScoresError: There are no examples, or an activation or gradient is not finite; the
            message names the module.
    """
    gates = Gates(model, units)
    found = {}
    for site in units:
        found[site.kind, site.path] = Moments.of(projection(model, site))
    with gates, _listening(model, units, found), evaluating(model), frozen(model):
        for batch in track(batches, "second moments", disable=not progress, transient=True):
            inputs = {k: v for k, v in placed(model, batch).items() if k not in ("labels", "label")}
            gates.fired.clear()
            with torch.enable_grad():
                logits = logits_of(model(**inputs))
                gates.check_fired()
                roots = decision_roots(logits, problem_type(model.config)).sum(0)
                for number, root in enumerate(roots, 1):
                    root.backward(retain_graph=number < len(roots))
            for moments in found.values():
                moments.examples += gates.examples
    for (kind, path), moments in found.items():
        moments.reduce()
        if not moments.examples:
            raise UnusableScoresError("no examples were scored: the calibration data is empty")
        if not torch.isfinite(moments.outer).all() or not torch.isfinite(moments.second).all():
            raise UnusableScoresError(f"gradients at the {kind} of {path!r} are not finite")
    return found


def decision_roots(
    logits: torch.Tensor, problem: ProblemType, temperature: float = 2.0, outcomes: int = 8
) -> torch.Tensor:
    """Write how a model's decision listens to its insides as squares of gradients.

    For one class per example the decision is that for the likeliest class against all others. With
    `p` its probability, the curvature of the divergence is `(∂p)² / (p (1 − p))`, the square of the
    gradient of `√(p (1 − p)) · log(p / (1 − p))`, the square root held constant: one backward pass,
    however many classes there are. For the other problems see `divergence_roots`.

    Args:
        logits: `[examples, classes]`.
        problem: What the logits mean.
        temperature: Of the probabilities; above 1, so that sure examples count too.
        outcomes: Questions or outputs at most, where there are several.

    Returns:
        `[examples, roots]`.

    Examples:
        >>> decision_roots(torch.zeros(1, 4), "single_label_classification")  # √(3/16) log(1/3)
        tensor([[-0.9514]])
    """
    if problem != "single_label_classification":
        return divergence_roots(logits, problem, temperature)[:, :outcomes]
    log_p = (logits.float() / temperature).log_softmax(-1)
    top = log_p.detach().argmax(-1, keepdim=True)
    others = log_p.scatter(-1, top, float("-inf")).logsumexp(-1, keepdim=True)
    ours = log_p.gather(-1, top)
    return temperature * ((ours + others) / 2).exp().detach() * (ours - others)


def projection(model: nn.Module, site: Site) -> torch.Tensor:
    """Return the weight that a site's units meet, a view of `[outputs, inputs]`.

    Raises:
        ValueError: They meet none.
    """
    for cut in site.cuts:
        if (cut.module, cut.tensor) == (site.gate, "weight"):
            weight = model.get_submodule(site.gate).get_parameter("weight").detach()
            if weight.ndim == 2:
                return weight.movedim(cut.dim, -1)
    raise ValueError(f"{site.gate!r} has no weight matrix that meets the {site.kind} as its inputs")


@contextmanager
def _listening(model: nn.Module, units: Units, found: Mapping[Key, Moments]) -> Iterator[None]:
    def hook(site: Site) -> Callable[..., torch.Tensor]:
        moments = found[site.kind, site.path]

        def listen(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            x = args[0].detach()
            if not torch.isfinite(x).all():
                raise UnusableScoresError(
                    f"the input of {site.gate!r} is not finite: check the model's weights and "
                    "the calibration data for NaN and overflow"
                )
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            output.register_hook(lambda g: moments.add(x.flatten(0, -2), g.flatten(0, -2)))
            return output

        return listen

    handles = [model.get_submodule(s.gate).register_forward_hook(hook(s)) for s in units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
