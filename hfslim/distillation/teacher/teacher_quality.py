"""Check that a teacher is better than chance."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers.utils import logging

from hfslim.tasks.label_check import CLEAR, fit_of
from hfslim.training.objective import IGNORED_LABEL, ProblemType, hard_loss

__all__ = ["OVERRIDE", "UntrainedTeacherError", "check_quality"]

logger = logging.get_logger(__name__)

OVERRIDE = "Fine-tune it first, or set allow_untrained_teacher=True."
_ENOUGH_EXAMPLES = 30


class UntrainedTeacherError(ValueError):
    """The teacher has new weights or is at chance level."""


def check_quality(
    logits: Tensor, labels: Tensor, problem: ProblemType, teacher: str = "the teacher"
) -> float | None:
    """Refuse a teacher whose outputs are at chance level.

    Single-label: the recall averaged over the classes that occur. Otherwise: the correlation of
    outputs and labels, averaged over outputs. Either must be two standard errors above chance.

    Args:
        logits: `[batch, classes]` of the teacher, in the order of the labels.
        labels: `[batch]`, or `[batch, classes]`.
        problem: The meaning of the logits.
        teacher: Its name in messages.

    Returns:
        The score, or None with fewer than 30 examples or constant labels.

    Raises:
        UntrainedTeacherError: If the teacher is at chance level.
        ValueError: If the labels do not fit the logits.
    """
    hard_loss(logits, labels, problem)  # Refuses labels that do not fit.
    if problem == "single_label_classification":
        labels = labels.reshape(-1)
        known = labels != IGNORED_LABEL
        logits, labels = logits[known], labels[known]
    if len(labels) < _ENOUGH_EXAMPLES:
        logger.warning(
            f"{teacher} is not checked: {len(labels)} labelled examples are too few to "
            f"compare it with chance ({_ENOUGH_EXAMPLES} are needed)."
        )
        return None
    if problem == "single_label_classification":
        hits = (logits.argmax(dim=-1) == labels).double()
        counts = torch.bincount(labels)
        counts = counts[counts > 0].double()
        if len(counts) < 2:
            return None
        recalls = torch.stack([hits[labels == label].mean() for label in labels.unique()])
        name, score, chance = "balanced accuracy", recalls.mean().item(), 1 / len(counts)
        error = math.sqrt((chance * (1 - chance) / counts).sum().item()) / len(counts)
    else:
        target = labels.reshape(logits.shape).double()
        varied = target.std(dim=0) > 0
        if not varied.any():
            return None
        x, y = (v[:, varied] - v[:, varied].mean(dim=0) for v in (logits.double(), target))
        norms = (x.norm(dim=0) * y.norm(dim=0)).clamp(min=1e-30)
        name, chance = "correlation with the labels", 0.0
        score = ((x * y).sum(0) / norms).mean().item()
        error = 1 / math.sqrt(len(target))
    fit = fit_of(logits.double().cpu().numpy(), labels.cpu().numpy(), problem)
    fits = "" if fit.best is None else f"; in the order {list(fit.best)} its outputs would fit"
    if fit.gain > CLEAR:
        raise UntrainedTeacherError(
            f"The {name} of {teacher} on {len(labels)} examples is {score:.3f}{fits}: set "
            "config.id2label of the teacher to the names of its outputs, in their order, or "
            "allow_untrained_teacher=True."
        )
    if not score > chance + 2 * error:
        raise UntrainedTeacherError(
            f"The {name} of {teacher} on {len(labels)} examples is {score:.3f}, which is chance "
            f"level ({chance:.3f} ± {2 * error:.3f}). Check that it was trained on these labels, "
            f"in this order{fits}. {OVERRIDE}"
        )
    logger.info(f"{teacher}: {name} {score:.3f} on {len(labels)} examples (chance {chance:.3f}).")
    return score
