"""Preemption: on SIGTERM a training saves a checkpoint after the current step and ends."""

from __future__ import annotations

import signal
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

__all__ = ["SaveOnSigterm"]

logger = logging.get_logger(__name__)

EXIT_CODE = 128 + signal.SIGTERM
"""A shell's exit code of a process that SIGTERM ended."""


class SaveOnSigterm(TrainerCallback):
    """Ends a training between two steps on SIGTERM, the signal of preemption.

    All processes exchange at the end of each step whether one has received it, so one signal to one
    process is enough. The checkpoint is an ordinary one. `SystemExit` keeps the script from going
    on as if the training were complete, also where the signal came after the last step.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._asked = self._agreed = False
        self._before: Any = None

    def leave(self) -> None:
        """Raise SystemExit if the signal came while the last step was evaluated or saved."""
        if self._before is not None and self._asked_anywhere():
            logger.warning(
                "SIGTERM after the last step: exiting; "
                "train(resume_from_checkpoint=True) completes the training"
            )
            raise SystemExit(EXIT_CODE)

    def stop(self) -> None:
        """Restore the earlier handler of SIGTERM."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Install the handler of SIGTERM."""
        self._asked = self._agreed = False
        self._before = signal.signal(signal.SIGTERM, self._note)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Request a checkpoint if any process has received the signal."""
        self._agreed = self._asked_anywhere()
        if self._agreed:
            control.should_save = control.should_training_stop = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Request a checkpoint after the last step."""
        last = self._before is not None and state.global_step >= state.max_steps
        if last and self._asked_anywhere():
            control.should_save = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Exit, after the checkpoint is written."""
        if self._agreed:
            logger.warning(
                f"SIGTERM: checkpoint-{state.global_step} is saved, exiting; "
                "train(resume_from_checkpoint=True) goes on from there"
            )
            raise SystemExit(EXIT_CODE)

    def _asked_anywhere(self) -> bool:
        asked = torch.tensor(float(self._asked), device=self._accelerator.device)
        return bool(self._accelerator.reduce(asked, reduction="sum"))

    def _note(self, *_: Any) -> None:
        self._asked = True
