"""Ways to train on several processes: DDP, DeepSpeed's ZeRO, FSDP."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env, patch_environment
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import deepspeed

__all__ = [
    "CONFIGURATIONS",
    "check_fsdp",
    "forget_trainers",
    "loading_whole",
    "save_where_asked",
    "way_of",
    "whole",
]

CONFIGURATIONS = {
    "DDP": "multi_gpu.yaml",
    "ZeRO-2": "deepspeed_zero2.yaml",
    "ZeRO-3": "deepspeed_zero3.yaml",
    "FSDP": "fsdp2.yaml",
}
"""Each way and the file in accelerate_configs that launches it."""
_FLAGS = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")


def way_of(args: TrainingArguments) -> str:
    """Return the way of a launch or of a Trainer's arguments, a key of `CONFIGURATIONS`.

    One process counts as DDP, the first stage of ZeRO as the second.
    """
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "FSDP"
    plugin = args.deepspeed_plugin
    if plugin is None:
        return "DDP"
    return "ZeRO-3" if plugin.zero_stage == 3 else "ZeRO-2"


def check_fsdp(args: TrainingArguments) -> None:
    """Raise ValueError for FSDP where the Trainer ignores it: on the CPU, and in one process."""
    if way_of(args) == "FSDP" and PartialState().distributed_type in (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
    ):
        where = args.device if args.world_size > 1 else "one process"
        raise ValueError(
            f"FSDP was asked for and the Trainer would ignore it on {where}: use several GPUs, "
            "or DDP on the CPU (accelerate_configs/multi_cpu.yaml)"
        )


def save_where_asked(model: Any) -> None:
    """Make a model's `save_pretrained` write on every process that a Trainer calls it on.

    Otherwise it writes on the first process of all only, and `save_on_each_node` needs the first
    process of each machine.
    """
    if isinstance(model, PreTrainedModel):
        model.should_save_on_this_rank = bool  # type: ignore[method-assign, assignment]


def forget_trainers() -> None:
    """Forget the DeepSpeed settings of earlier Trainers, so that a new one uses its own.

    accelerate refuses a second Trainer's settings otherwise, and transformers loads every model in
    ZeRO-3's parts.
    """
    AcceleratorState._reset_state()
    deepspeed.unset_hf_deepspeed_config()


@contextmanager
def loading_whole() -> Iterator[None]:
    """Load models whole on each process inside the block.

    Otherwise they are built in parts after a Trainer is set up for ZeRO-3, and FSDP may initialise
    new weights only on the first process of a machine.
    """
    before = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        with patch_environment(fsdp_cpu_ram_efficient_loading="false"):
            yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before


@contextmanager
def whole(args: TrainingArguments) -> Iterator[TrainingArguments]:
    """Yield arguments of a Trainer that evaluates a model whole on each process.

    By its own arguments the Trainer splits the model, which the first process alone cannot run any
    more, and under ZeRO it evaluates only at stage 3.
    """
    if way_of(args) == "DDP":
        yield args
        return
    plain: Any = copy.copy(args)
    plain.deepspeed = plain.deepspeed_plugin = plain.hf_deepspeed_config = None
    plain.fsdp, plain.fsdp_plugin_args = False, None
    flags = {name: os.environ.pop(name) for name in _FLAGS if name in os.environ}
    state = PartialState._shared_state
    kind = state["distributed_type"]
    if kind == DistributedType.DEEPSPEED:
        several = args.world_size > 1
        state["distributed_type"] = DistributedType.MULTI_GPU if several else DistributedType.NO
    forget_trainers()
    try:
        yield plain
    finally:
        os.environ.update(flags)
        state["distributed_type"] = kind
        forget_trainers()
