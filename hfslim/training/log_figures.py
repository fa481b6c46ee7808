"""Figures that callbacks add to a Trainer's log, for everything that it reports to."""

from __future__ import annotations

import logging
import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

__all__ = ["FiguresCallback", "FiguresMixin", "announce"]

logger = logging.getLogger(__name__)


def announce(state: TrainerState, message: str) -> None:
    """Log a message, and print it on standard error where no logging shows it.

    A script that sets the level of the logger `hfslim`, as the command does, decides itself.
    """
    logger.info(message)
    decided = logger.isEnabledFor(logging.INFO) or logging.getLogger("hfslim").level
    if state.is_world_process_zero and not decided:
        tqdm.write(message, file=sys.stderr)


class FiguresCallback(TrainerCallback):
    """A callback with figures of its own for each log of the training loss.

    A Trainer with `FiguresMixin` adds them before it logs. The stock Trainer calls TensorBoard and
    the like before this callback, so only its printed log and `log_history` hold the figures. The
    entries of evaluations hold them too, from where they get into the Trainer's model card.
    """

    def figures(self) -> dict[str, float]:
        """Return the figures to log now, by name; empty before there are any."""
        raise NotImplementedError

    def on_log(  # type: ignore[override]  # the Trainer always passes the logs
        self, args: TrainingArguments, state: TrainerState, *_: Any, logs: Any, **__: Any
    ) -> None:
        """Add the figures to the stock Trainer's log."""
        if "loss" in logs:
            logs.update(self.figures())
            state.log_history[-1].update(self.figures())
        elif "eval_loss" in logs:
            figures = {f"units_{name}": value for name, value in self.figures().items()}
            state.log_history[-1].update(figures)


class FiguresMixin(Trainer):
    """Logs its callbacks' figures together with the training loss."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the figures of each `FiguresCallback`."""
        if "loss" in logs:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, FiguresCallback):
                    logs.update(callback.figures())
        super().log(logs, *args, **kwargs)
