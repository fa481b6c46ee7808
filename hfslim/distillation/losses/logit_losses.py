"""Logit distillation losses, one value per example; their mean over the batch is the usual loss."""

from __future__ import annotations

from typing import Literal, get_args

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

LogitLoss = Literal["kl", "dkd", "dist"]
LOGIT_LOSSES: tuple[LogitLoss, ...] = get_args(LogitLoss)


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute `T² · KL(softmax(teacher / T) ‖ softmax(student / T))` for each example.

    The factor keeps the gradient's size while the temperature changes. Computed in float32.

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


def decoupled_kl(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Compute `T² · (TCKD + β · NCKD)`: the two parts of the KL divergence, weighed apart.

    TCKD compares how sure the models are of the label, NCKD how they rank the other classes. In
    plain KL the second part fades where the teacher is sure, with weight one less its probability.

    Args:
        student: Logits `[batch, classes]`.
        teacher: Logits `[batch, classes]`, in the student's class order.
        labels: `[batch]` integers; examples labelled -100 cost nothing.
        temperature: T > 0.
        beta: Weight of NCKD; 0.5 to 8 in the paper, more where the teacher is surer.

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
        # Where a model is sure of the label, the label's own share of the others is infinite.
        shares = (logs - others).masked_fill(label, 0.0)
        return torch.cat([logs[label][:, None], others], -1), shares

    (target_t, other_t), (target_s, other_s) = parts(teacher), parts(student)
    tckd = (target_t.exp() * (target_t - target_s)).sum(-1)
    nckd = (other_t.exp() * (other_t - other_s)).sum(-1)
    return (tckd + beta * nckd).masked_fill(~known, 0.0) * temperature**2


def correlation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute `T² · ((1 − ρ of its row) + (1 − mean ρ of the columns))` for each example.

    ρ is Pearson's correlation of the two models' probabilities: over the classes of an example
    (row), and over the examples of a class (column). The column part is the same for all examples
    of a batch and depends on which examples share it, so it is not invariant under accumulation or
    several processes; a batch of one example has none. Of two classes ρ of a row is 1 or −1, which
    teaches nothing: the columns alone do.

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
    kind: LogitLoss = "kl",
    labels: Tensor | None = None,
    beta: float = 1.0,
) -> Tensor:
    """Compute the distillation loss that fits the problem.

    Args:
        student: Logits `[batch, classes]`.
        teacher: Logits `[batch, classes]`, in the student's class order.
        problem: What the logits mean; the temperature is of no effect for regression.
        temperature: T > 0.
        kind: `kl`, `dkd` (`decoupled_kl`) or `dist` (`correlation`).
        labels: `[batch]` integers, for `dkd`.
        beta: Of `decoupled_kl`.

    Returns:
        `[batch]`.

    Raises:
        ValueError: If the shapes differ, or the loss is not for the problem.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's logits have shape {list(student.shape)}, the teacher's "
            f"{list(teacher.shape)}; both must be [batch, classes] with the same classes."
        )
    if kind != "kl" and problem != "single_label_classification":
        raise ValueError(
            f"logit_loss={kind!r} compares one distribution over all classes, and this is "
            f"{problem}; use 'kl', which becomes the form that fits."
        )
    if kind == "dkd":
        if labels is None or labels.is_floating_point() or labels.numel() != len(student):
            raise ValueError(
                "logit_loss='dkd' splits the classes at the label, so that it needs one integer "
                "label per example (no mixup, no unlabelled data); use 'kl' or 'dist'."
            )
        return decoupled_kl(student, teacher, labels.reshape(-1), temperature, beta)
    if kind == "dist":
        return correlation(student, teacher, temperature)
    if problem == "regression":
        return squared_error(student, teacher)
    if problem == "multi_label_classification":
        return binary_kl_divergence(student, teacher, temperature)
    return kl_divergence(student, teacher, temperature)
