"""Figures that callbacks add to a Trainer's log, seen by all that it reports to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

__all__ = ["FiguresCallback", "FiguresMixin"]


class FiguresCallback(TrainerCallback):
    """A callback with figures of its own for each log of the training loss.

    A Trainer with `FiguresMixin` takes them before it logs. The stock Trainer tells TensorBoard and
    the like before it tells a callback, so there they are in what is printed and in `log_history`.
    """

    def figures(self) -> dict[str, float]:
        """Return what to add to the log now, by name; nothing where there is nothing yet."""
        raise NotImplementedError

    def on_log(  # type: ignore[override]  # the Trainer always passes the logs
        self, args: TrainingArguments, state: TrainerState, *_: Any, logs: Any, **__: Any
    ) -> None:
        """Add them to the stock Trainer's log."""
        if "loss" in logs:
            logs.update(self.figures())
            state.log_history[-1].update(self.figures())


class FiguresMixin(_Base):
    """Logs its callbacks' figures together with the training loss."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the figures of each `FiguresCallback`."""
        if "loss" in logs:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, FiguresCallback):
                    logs.update(callback.figures())
        super().log(logs, *args, **kwargs)
