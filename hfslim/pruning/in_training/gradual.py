"""The common part of callbacks that prune gradually: a schedule, and a state to resume from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel, TrainerState
from transformers import TrainingArguments as Arguments
from transformers.trainer_callback import ExportableState

from hfslim.anatomy.model_state import check_state
from hfslim.pruning.in_training.schedules import Decisions, Pace
from hfslim.training.callback_requirements import (
    average_over_processes,
    check_saved_between_steps,
    saved_state,
)
from hfslim.training.log_figures import FiguresCallback

logger = logging.getLogger(__name__)


class GradualCallback(FiguresCallback, ExportableState):
    """A callback that takes decisions on a schedule and resumes exactly from checkpoints.

    Args:
        arguments: The arguments of the callback as plain values, `schedule`, `start`, `end` and
            `interval` among them; saved in checkpoints and compared when training resumes.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._pace = Pace(*(arguments[name] for name in ("schedule", "start", "end", "interval")))
        self._decisions: Decisions = None  # type: ignore[assignment]  # set when training begins

    def state(self) -> dict[str, Any]:
        """Return the state that the Trainer writes into a checkpoint."""
        return {"args": self._arguments, "attributes": {"saved": self._checkpoint()}}

    def _checkpoint(self) -> dict[str, Any] | None:
        """Return the content of a checkpoint; None before training."""
        raise NotImplementedError

    def _saved(self, state: TrainerState) -> Mapping[str, Any]:
        """Return the content of the checkpoint; raise a ValueError if it is another callback's."""
        return saved_state(state, type(self).__name__, self._arguments)

    def _has_scores(self, state: TrainerState) -> bool:
        """Return whether there are scores to decide by; called on all ranks."""
        raise NotImplementedError

    def _begin(self, args: Arguments, state: TrainerState, model: PreTrainedModel) -> None:
        """Check the training, and schedule the decisions."""
        check_saved_between_steps(type(self).__name__)
        check_state(model)
        average_over_processes(args)
        self._decisions = self._pace.over(state.max_steps)

    def _ended_early(self, state: TrainerState, decide: Callable[[], None]) -> bool:
        """Decide now if training stopped before the last decision; return whether it did."""
        if state.global_step >= self._decisions.last:
            return False
        if self._has_scores(state):
            logger.warning(
                "training stopped at step %d, before the target was due at step %d: pruning to the "
                "target now, without recovery",
                state.global_step,
                self._decisions.last,
            )
            decide()
        else:
            logger.warning(
                "training stopped at step %d, before the first score at step %d: the model is not "
                "pruned; train for longer, or prune the trained model",
                state.global_step,
                self._decisions.first + 1,
            )
        return True


def forget_best(state: TrainerState) -> None:
    """Reset the best model of a training: models before a decision are not comparable."""
    state.best_metric = state.best_model_checkpoint = state.best_global_step = None
