"""Losses on logits, and the table of their names.

The functions take the logits of student and teacher, `[batch, classes]` in one order of classes,
and a temperature T > 0. They compute in float32 and return one value per example, `[batch]`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from hfslim.training.objective import ProblemType

__all__ = [
    "LOGIT_LOSSES",
    "LogitLoss",
    "binary_kl_divergence",
    "correlation",
    "decoupled_kl",
    "distillation_loss",
    "kl_divergence",
    "squared_error",
]

_ARGUMENTS = frozenset({"temperature", "labels", "beta", "problem"})


@dataclass(frozen=True)
class LogitLoss:
    """A logit loss and when it can be used.

    Attributes:
        function: Takes the logits of student and teacher, `[batch, classes]`, and any of
            `temperature` (T > 0), `labels`, `beta` (`dkd_beta`) and `problem`; returns `[batch]`.
        problems: The problem types for which it is defined.
        across_examples: Whether an example's loss depends on the others of its batch, so that
            several batches in a step give another loss than one large batch.

    Raises:
        ValueError: The function requires another argument.
    """

    function: Callable[..., Tensor]
    problems: tuple[ProblemType, ...] = ("single_label_classification",)
    across_examples: bool = False

    def __post_init__(self) -> None:
        unknown = [
            p.name for p in self._further if p.name not in _ARGUMENTS and p.default is p.empty
        ]
        if unknown:
            raise ValueError(
                f"a logit loss takes {unknown}; after the logits of student and teacher it can "
                f"take {sorted(_ARGUMENTS)}."
            )

    @property
    def arguments(self) -> frozenset[str]:
        """The names of the arguments that the function takes after the logits."""
        return _ARGUMENTS & {p.name for p in self._further}

    @property
    def _further(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.function).parameters.values())[2:]


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute `T² · KL(softmax(teacher / T) ‖ softmax(student / T))` for each example.

    In nats; the mean is `batchmean` of `torch.nn.KLDivLoss`. The factor T² keeps the gradient's
    size independent of the temperature; a higher one weighs the ranking of wrong classes more.

    Examples:
        >>> kl_divergence(torch.zeros(1, 2), torch.tensor([[1.0986123, 0.0]]))
        tensor([0.1308])

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
    """
    log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1) * temperature**2


def binary_kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute T² times the mean over classes of the KL of each class's yes-or-no distribution.

    In nats, for multi-label models: a softmax would make independent classes compete.

    Examples:
        >>> binary_kl_divergence(torch.zeros(1, 2), torch.tensor([[1.0986123, 0.0]]))
        tensor([0.0654])

    References:
        Yang et al., Multi-Label Knowledge Distillation, 2023, arXiv:2308.06453.
    """
    t, s = teacher.float() / temperature, student.float() / temperature
    yes = t.sigmoid() * (F.logsigmoid(t) - F.logsigmoid(s))
    no = (-t).sigmoid() * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return (yes + no).mean(dim=-1) * temperature**2


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean over outputs of the squared difference, for regression.

    Examples:
        >>> squared_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]]))
        tensor([2.])

    References:
        Ba and Caruana, Do Deep Nets Really Need to be Deep?, 2013, arXiv:1312.6184.
    """
    return (student.float() - teacher.float()).square().mean(dim=-1)


def decoupled_kl(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Compute `T² · (TCKD + β · NCKD)`: the two parts of the KL divergence, weighted separately.

    TCKD compares the probabilities of the label, NCKD the distributions over the other classes. In
    plain KL the weight of NCKD is one less the teacher's probability of the label.

    Args:
        student: Logits.
        teacher: Logits.
        labels: `[batch]` integers; the loss of examples labelled -100 is 0.
        temperature: T.
        beta: Weight of NCKD; 0.5 to 8 in the paper, larger for a more confident teacher.

    Examples:
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[0.0, 1.0986123, 0.0]])
        >>> decoupled_kl(student, teacher, torch.tensor([0]))
        tensor([0.1745])

    References:
        Zhao et al., Decoupled Knowledge Distillation, 2022, arXiv:2203.08679.
    """
    known = labels >= 0
    label = F.one_hot(labels.clamp(min=0), student.shape[-1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        logs = F.log_softmax(logits.float() / temperature, dim=-1)
        others = logs.masked_fill(label, -torch.inf).logsumexp(-1, keepdim=True)
        # For a confident model the label's own logarithm relative to the others is infinite.
        shares = (logs - others).masked_fill(label, 0.0)
        return torch.cat([logs[label][:, None], others], -1), shares

    (target_t, other_t), (target_s, other_s) = parts(teacher), parts(student)
    tckd = (target_t.exp() * (target_t - target_s)).sum(-1)
    nckd = (other_t.exp() * (other_t - other_s)).sum(-1)
    return (tckd + beta * nckd).masked_fill(~known, 0.0) * temperature**2


def correlation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute `T² · ((1 − ρ of its row) + (1 − mean ρ of the columns))` for each example.

    Its mean is the paper's loss with β = γ = 1. ρ is Pearson's correlation of the probabilities
    over the classes of an example (row) or the examples of a class (column). The column part is the
    same for all examples of a batch and depends on its composition, so it is not invariant under
    accumulation or several processes; a batch of one example has none. With two classes ρ of a row
    is 1 or −1, so that only the columns have a gradient.

    Examples:
        >>> correlation(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]]))
        tensor([1.8671])

    References:
        Huang et al., Knowledge Distillation from A Stronger Teacher, 2022, arXiv:2205.10536.
    """
    p = F.softmax(teacher.float() / temperature, dim=-1)
    q = F.softmax(student.float() / temperature, dim=-1)
    distance = 1 - _pearson(q, p)
    if len(q) > 1:
        distance = distance + (1 - _pearson(q.T, p.T)).mean()
    return distance * temperature**2


def _pearson(one: Tensor, other: Tensor) -> Tensor:
    one, other = (x - x.mean(-1, keepdim=True) for x in (one, other))
    return F.cosine_similarity(one, other, dim=-1, eps=1e-8)


def fitting_divergence(
    student: Tensor, teacher: Tensor, temperature: float, problem: ProblemType
) -> Tensor:
    """Compute the KL divergence in the form that fits the problem; for regression, the square."""
    if problem == "regression":
        return squared_error(student, teacher)
    if problem == "multi_label_classification":
        return binary_kl_divergence(student, teacher, temperature)
    return kl_divergence(student, teacher, temperature)


LOGIT_LOSSES: dict[str, LogitLoss] = {
    "kl": LogitLoss(fitting_divergence, get_args(ProblemType)),
    "dkd": LogitLoss(decoupled_kl),
    "dist": LogitLoss(correlation, across_examples=True),
}
"""The losses on logits by their names in `DistillationConfig.logit_loss`."""


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    problem: ProblemType,
    temperature: float,
    kind: str = "kl",
    labels: Tensor | None = None,
    beta: float = 1.0,
) -> Tensor:
    """Compute a logit loss by its name.

    Args:
        student: Logits.
        teacher: Logits.
        problem: The meaning of the logits.
        temperature: T; without effect for regression.
        kind: A name of `LOGIT_LOSSES`.
        labels: `[batch]` integers, for losses that take labels.
        beta: The weight in `decoupled_kl`.

    Raises:
        ValueError: The shapes differ, the loss is not for the problem or the labels, or it returns
            another shape.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's logits have shape {list(student.shape)}, the teacher's "
            f"{list(teacher.shape)}; both must be [batch, classes] with the same classes."
        )
    loss = LOGIT_LOSSES[kind]
    arguments = loss.arguments
    if problem not in loss.problems:
        raise ValueError(
            f"logit_loss={kind!r} is for {', '.join(loss.problems)}, and this is {problem}; use "
            "'kl', which becomes the form that fits."
        )
    if "labels" in arguments and problem == "single_label_classification":
        if labels is None or labels.is_floating_point() or labels.numel() != len(student):
            raise ValueError(
                f"logit_loss={kind!r} needs one integer label per example (no mixup, no unlabelled "
                "data); use 'kl' or 'dist'."
            )
        labels = labels.reshape(-1)
    given = {"temperature": temperature, "labels": labels, "beta": beta, "problem": problem}
    values = loss.function(student, teacher, **{name: given[name] for name in arguments})
    if values.shape != student.shape[:1]:
        raise ValueError(
            f"logit_loss={kind!r} returned shape {list(values.shape)}; expected one value per "
            f"example, {list(student.shape[:1])}."
        )
    return values
