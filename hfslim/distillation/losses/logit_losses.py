"""Losses on logits, one value per example, and the table of those that a config can name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, get_args

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
    "register_logit_loss",
    "squared_error",
]

_SINGLE_LABEL: tuple[ProblemType, ...] = ("single_label_classification",)
_ARGUMENTS = frozenset({"temperature", "labels", "beta", "problem"})
_Function = TypeVar("_Function", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class LogitLoss:
    """A logit loss and when it can be used.

    Attributes:
        function: Takes the student's and the teacher's logits `[batch, classes]`, then `arguments`
            by name; returns `[batch]`.
        arguments: Names of its further arguments, some of `temperature` (T > 0), `labels`,
            `beta` (`dkd_beta`) and `problem`.
        problems: Problem types of the models that it compares.
        across_examples: Whether an example's value depends on the others of its batch, so that
            several batches in a step are not what one large batch would be.
    """

    function: Callable[..., Tensor]
    arguments: frozenset[str]
    problems: tuple[ProblemType, ...] = _SINGLE_LABEL
    across_examples: bool = False


LOGIT_LOSSES: dict[str, LogitLoss] = {}
"""The losses on logits by their names in `DistillationConfig.logit_loss`."""


def register_logit_loss(
    name: str, problems: Sequence[ProblemType] = _SINGLE_LABEL, across_examples: bool = False
) -> Callable[[_Function], _Function]:
    """Return a decorator that makes a function the logit loss of a name.

    Args:
        name: For `DistillationConfig.logit_loss` and recipes.
        problems: As for `LogitLoss`.
        across_examples: As for `LogitLoss`.

    Raises:
        ValueError: The name is taken, or the function has an argument that no trainer gives.

    Examples:
        >>> @register_logit_loss("logit_mse")
        ... def logit_mse(student, teacher, temperature):
        ...     return ((student - teacher) / temperature).square().mean(-1)
        >>> LOGIT_LOSSES.pop("logit_mse").arguments
        frozenset({'temperature'})
    """

    def register(function: _Function) -> _Function:
        if name in LOGIT_LOSSES:
            raise ValueError(f"there is a logit loss {name!r} already; choose another name.")
        further = list(inspect.signature(function).parameters.values())[2:]
        unknown = [p.name for p in further if p.name not in _ARGUMENTS and p.default is p.empty]
        if unknown:
            raise ValueError(
                f"the logit loss {name!r} takes {unknown}; after the logits of student and teacher "
                f"it can take {sorted(_ARGUMENTS)}."
            )
        arguments = _ARGUMENTS & {p.name for p in further}
        LOGIT_LOSSES[name] = LogitLoss(function, arguments, tuple(problems), across_examples)
        return function

    return register


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute `T² · KL(softmax(teacher / T) ‖ softmax(student / T))` for each example.

    The factor T² keeps the gradient's size independent of the temperature. Computed in float32.

    Args:
        student: Logits `[batch, classes]`.
        teacher: Logits `[batch, classes]`, in the student's class order.
        temperature: T > 0; higher shows more of the teacher's ranking of the wrong classes.

    Returns:
        `[batch]`, in nats; the mean is `batchmean` of `torch.nn.KLDivLoss`.

    Examples:
        >>> import torch
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

    For multi-label models, where a softmax would make independent classes compete.

    Args:
        student: Logits `[batch, classes]`.
        teacher: Logits `[batch, classes]`, in the student's class order.
        temperature: T > 0, dividing both models' logits.

    Returns:
        `[batch]`, in nats.

    Examples:
        >>> import torch
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

    Args:
        student: Outputs `[batch, outputs]`.
        teacher: Outputs `[batch, outputs]`.

    Returns:
        `[batch]`, in the square of the outputs' unit.

    Examples:
        >>> import torch
        >>> squared_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]]))
        tensor([2.])

    References:
        Ba and Caruana, Do Deep Nets Really Need to be Deep?, 2013, arXiv:1312.6184.
    """
    return (student.float() - teacher.float()).square().mean(dim=-1)


@register_logit_loss("kl", get_args(ProblemType))
def fitting_divergence(
    student: Tensor, teacher: Tensor, temperature: float, problem: ProblemType
) -> Tensor:
    """Compute the KL divergence in the form that fits the problem; for regression, the square."""
    if problem == "regression":
        return squared_error(student, teacher)
    if problem == "multi_label_classification":
        return binary_kl_divergence(student, teacher, temperature)
    return kl_divergence(student, teacher, temperature)


@register_logit_loss("dkd")
def decoupled_kl(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Compute `T² · (TCKD + β · NCKD)`: the two parts of the KL divergence, weighted separately.

    TCKD compares the probabilities of the label, NCKD the distributions over the other classes. In
    plain KL the weight of NCKD is one less the teacher's probability of the label.

    Args:
        student: Logits `[batch, classes]`.
        teacher: Logits `[batch, classes]`, in the student's class order.
        labels: `[batch]` integers; examples labelled -100 cost nothing.
        temperature: T > 0.
        beta: Weight of NCKD; 0.5 to 8 in the paper, larger for a more confident teacher.

    Returns:
        `[batch]`, in nats.

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


@register_logit_loss("dist", across_examples=True)
def correlation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute `T² · ((1 − ρ of its row) + (1 − mean ρ of the columns))` for each example.

    ρ is Pearson's correlation of the two models' probabilities: over the classes of an example
    (row), and over the examples of a class (column). The column part is the same for all examples
    of a batch and depends on its composition, so it is not invariant under accumulation or several
    processes; a batch of one example has none. With two classes ρ of a row is 1 or −1 and has no
    gradient; only the columns have one.

    Args:
        student: Logits `[batch, classes]`.
        teacher: Logits `[batch, classes]`, in the student's class order.
        temperature: T > 0.

    Returns:
        `[batch]`; the mean is the paper's loss with β = γ = 1.

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
        student: Logits `[batch, classes]`.
        teacher: Logits `[batch, classes]`, in the student's class order.
        problem: The meaning of the logits.
        temperature: T > 0; without effect for regression.
        kind: A name of `LOGIT_LOSSES`.
        labels: `[batch]` integers, for losses that take labels.
        beta: The weight in `decoupled_kl`.

    Returns:
        `[batch]`.

    Raises:
        ValueError: If the shapes differ, or the loss is not for the problem or the labels, or it
            returns another shape.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's logits have shape {list(student.shape)}, the teacher's "
            f"{list(teacher.shape)}; both must be [batch, classes] with the same classes."
        )
    loss = LOGIT_LOSSES[kind]
    if problem not in loss.problems:
        raise ValueError(
            f"logit_loss={kind!r} is for {', '.join(loss.problems)}, and this is {problem}; use "
            "'kl', which becomes the form that fits."
        )
    if "labels" in loss.arguments and problem == "single_label_classification":
        if labels is None or labels.is_floating_point() or labels.numel() != len(student):
            raise ValueError(
                f"logit_loss={kind!r} needs one integer label per example (no mixup, no unlabelled "
                "data); use 'kl' or 'dist'."
            )
        labels = labels.reshape(-1)
    given = {"temperature": temperature, "labels": labels, "beta": beta, "problem": problem}
    values = loss.function(student, teacher, **{name: given[name] for name in loss.arguments})
    if values.shape != student.shape[:1]:
        raise ValueError(
            f"logit_loss={kind!r} returned shape {list(values.shape)}; expected one value per "
            f"example, {list(student.shape[:1])}."
        )
    return values
