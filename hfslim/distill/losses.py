"""Logit distillation losses, one value per example; their mean over the batch is the usual loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from hfslim.objective import ProblemType

__all__ = ["binary_kl_divergence", "distillation_loss", "kl_divergence", "squared_error"]


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
    """
    return (student.float() - teacher.float()).square().mean(dim=-1)


def distillation_loss(
    student: Tensor, teacher: Tensor, problem: ProblemType, temperature: float
) -> Tensor:
    """Compute the distillation loss that fits the problem.

    Args:
        student: Logits `[batch, classes]`.
        teacher: Logits `[batch, classes]`, in the student's class order.
        problem: What the logits mean; the temperature is of no effect for regression.
        temperature: T > 0.

    Returns:
        `[batch]`.

    Raises:
        ValueError: If the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's logits have shape {list(student.shape)}, the teacher's "
            f"{list(teacher.shape)}; both must be [batch, classes] with the same classes."
        )
    if problem == "regression":
        return squared_error(student, teacher)
    if problem == "multi_label_classification":
        return binary_kl_divergence(student, teacher, temperature)
    return kl_divergence(student, teacher, temperature)
