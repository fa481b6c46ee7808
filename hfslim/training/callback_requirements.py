"""Requirements of a pruning callback on a training, and its state in a checkpoint."""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.state import AcceleratorState
from transformers import TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import CheckpointManager

from hfslim.training.parallel import way_of

logger = logging.getLogger(__name__)

CUT_AFTER = ", or cut the trained model in one go by hfslim.prune or hfslim.sparsify"
"""The way out of pruning in training."""


def check_whole_parameters(
    args: TrainingArguments, callback: str, ways: Sequence[str] = ("DDP",), otherwise: str = ""
) -> None:
    """Raise ValueError for a training that splits between processes what a callback needs whole.

    Args:
        args: The training's.
        callback: Its name.
        ways: The results of `way_of` that suit it. Under ZeRO-2 parameters are whole, gradients and
            the optimizer's state are not.
        otherwise: Another way out, for the message.
    """
    way = way_of(args)
    if way not in ways:
        raise ValueError(
            f"{callback} needs on each process what {way} splits between them: use "
            f"{' or '.join(ways)}{otherwise}"
        )


def check_unscaled(args: TrainingArguments, otherwise: str = "") -> None:
    """Raise ValueError for a training that scales the gradients, which the scores are made of."""
    accelerator: Any = AcceleratorState()
    if args.fp16 or accelerator.mixed_precision == "fp16":
        raise ValueError(
            "the changing loss scale of fp16 would distort the scores: train with bf16=True"
            + otherwise
        )


def check_saved_between_steps(callback: str) -> None:
    """Raise ValueError for the stock checkpoint on SIGTERM, taken in the middle of a step."""
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(getattr(handler, "__self__", None), CheckpointManager):
        raise ValueError(
            f"enable_jit_checkpoint of the stock Trainer saves in the middle of a step, each "
            f"process for itself, so a {callback} could not resume exactly: use hfslim.SlimTrainer "
            "or DistillationTrainer, which save between steps, or set it to False"
        )


def check_not_compiled(args: TrainingArguments, callback: str) -> None:
    """Raise ValueError for a compiled model, which ignores that gates change."""
    if args.torch_compile:
        raise ValueError(
            f"{callback} opens and closes gates in the model, which torch.compile traces once and "
            "does not see change: set torch_compile=False here, and compile the training that "
            "comes after"
        )


def average_over_processes(args: TrainingArguments) -> None:
    """Make gradients means over processes, also in the stock Trainer."""
    if args.world_size > 1 and args.average_tokens_across_devices:
        logger.warning(
            "average_tokens_across_devices is set to False: with it the stock Trainer multiplies a "
            "classifier's gradient by the number of processes"
        )
        args.average_tokens_across_devices = False


def saved_state(
    state: TrainerState, callback: str, arguments: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the state that a callback saved in the checkpoint that training resumes from.

    Raises:
        ValueError: The callback saved none, or had other arguments.
    """
    callbacks: Any = state.stateful_callbacks
    kept = callbacks.get(callback)
    saved = kept and kept["attributes"]["saved"]
    if not saved:
        raise ValueError(
            f"the checkpoint was saved without a {callback}, so pruning cannot be resumed; train "
            "without the callback, or start anew"
        )
    if kept["args"] != arguments:
        changed = [n for n, v in arguments.items() if kept["args"].get(n) != v]
        raise ValueError(
            f"the checkpoint was saved with other values of {changed}: pass the same {callback}, "
            "or start anew, without resume_from_checkpoint"
        )
    return saved
