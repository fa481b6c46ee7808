"""Figures that callbacks add to a Trainer's log, for everything that it reports to."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

__all__ = ["FiguresCallback", "FiguresMixin"]


class FiguresCallback(TrainerCallback):
    """A callback with figures of its own for each log of the training loss.

    A Trainer with `FiguresMixin` adds them before it logs. The stock Trainer calls TensorBoard and
    the like before this callback, so only its printed log and `log_history` hold the figures.
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


class FiguresMixin(Trainer):
    """Logs its callbacks' figures together with the training loss."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the figures of each `FiguresCallback`."""
        if "loss" in logs:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, FiguresCallback):
                    logs.update(callback.figures())
        super().log(logs, *args, **kwargs)
