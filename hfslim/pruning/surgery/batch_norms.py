"""Take the statistics of batch norms anew, after a cut has changed what they see."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from hfslim.measuring.timing import evaluating, placed
from hfslim.pruning.scores.batches import fitting
from hfslim.training.ranks import add_over_ranks, rank_count

logger = logging.getLogger(__name__)


@torch.no_grad()
def renew_batch_norms(model: PreTrainedModel, data: Iterable[Mapping[str, Any]]) -> int:
    """Set the running mean and variance of every batch norm to those of some data.

    The mean is over all batches of all ranks, so it depends on how examples are batched; those that
    do not fit into memory are halved. A norm in front of which channels are gone would
    otherwise go on with the statistics of before, which is most of what a convolutional net loses
    when it is cut. Weights stay as they are.

    Args:
        model: The model; in the mode that it has.
        data: Batches of model inputs, of more than one example each.

    Returns:
        The number of norms that were renewed.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    momentum = [norm.momentum for norm in norms]

    def once(batches: Iterable[Mapping[str, Any]]) -> int:
        for norm in norms:
            norm.reset_running_stats()
            norm.train().momentum = None
        count = 0
        for count, batch in enumerate(batches, 1):  # noqa: B007  # how many there were
            model(**placed(model, batch))
        return count

    with evaluating(model):
        count = fitting(once, data)
    for norm, old in zip(norms, momentum, strict=True):
        norm.momentum = old
        _average(norm, count)
    logger.info("took the statistics of %d batch norms anew, from %d batches", len(norms), count)
    return len(norms)


def _average(norm: _BatchNorm, count: int) -> None:
    """Average over ranks, by their numbers of batches."""
    if rank_count() == 1:
        return
    assert norm.running_mean is not None and norm.running_var is not None
    total = torch.tensor(float(count), device=norm.running_mean.device)
    add_over_ranks(total)
    for statistic in (norm.running_mean, norm.running_var):
        statistic *= count / total
        add_over_ranks(statistic)
