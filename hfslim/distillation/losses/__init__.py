"""Distillation losses, on logits, hidden states and attention, and how to add one."""

from __future__ import annotations

from hfslim.distillation.losses.feature_losses import FEATURE_LOSSES, FeatureLoss
from hfslim.distillation.losses.logit_losses import LOGIT_LOSSES, LogitLoss

__all__ = ["register_loss"]


def register_loss(name: str, loss: LogitLoss | FeatureLoss) -> None:
    """Add a loss to the table of logit losses or of feature losses.

    `DistillationConfig(logit_loss=name)`, or `feature_losses={name: weight}`, and recipes then
    take it, and training logs it. Register it before the config is made, and in every process.

    Args:
        name: A name that no loss has yet. A feature loss is logged as `loss_{name}`.
        loss: The function and what it compares.

    Raises:
        ValueError: The name is taken.

    Examples:
        >>> register_loss("logit_l1", LogitLoss(lambda s, t: (s - t).abs().mean(-1)))
        >>> del LOGIT_LOSSES["logit_l1"]
    """
    if name in {*LOGIT_LOSSES, *FEATURE_LOSSES, "hard", "distillation"}:
        raise ValueError(f"loss {name!r} is registered already: choose another name")
    if isinstance(loss, FeatureLoss):
        FEATURE_LOSSES[name] = loss
    else:
        LOGIT_LOSSES[name] = loss
