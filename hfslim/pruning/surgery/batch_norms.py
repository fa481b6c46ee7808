"""Recomputation of batch norm statistics, after a cut has changed the inputs of the norms."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from hfslim.measuring.timing import evaluating, placed
from hfslim.pruning.scores.batches import run_within_memory
from hfslim.training.ranks import add_over_ranks, rank_count

logger = logging.getLogger(__name__)


@torch.no_grad()
def renew_batch_norms(model: PreTrainedModel, data: Iterable[Mapping[str, Any]]) -> int:
    """Recompute the running mean and variance of every batch norm from data.

    The mean is over all batches of all ranks, so it depends on how examples are batched; batches
    that do not fit into memory are halved. Statistics from before the removal of channels cause
    most of the loss of a pruned convolutional net. Weights do not change. Batches need more than
    one example each. Returns the number of norms.
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
        for count, batch in enumerate(batches, 1):  # noqa: B007  # the number of batches
            model(**placed(model, batch))
        return count

    with evaluating(model):
        count = run_within_memory(once, data)
    for norm, old in zip(norms, momentum, strict=True):
        norm.momentum = old
        _average(norm, count)
    logger.info("recomputed the statistics of %d batch norms from %d batches", len(norms), count)
    return len(norms)


def _average(norm: _BatchNorm, count: int) -> None:
    """Average over ranks, weighted by their numbers of batches."""
    if rank_count() == 1:
        return
    assert norm.running_mean is not None and norm.running_var is not None
    total = torch.tensor(float(count), device=norm.running_mean.device)
    add_over_ranks(total)
    for statistic in (norm.running_mean, norm.running_var):
        statistic *= count / total
        add_over_ranks(statistic)
