"""Ways to train on several processes: DDP, DeepSpeed's ZeRO, FSDP."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, fsdp_utils, parse_flag_from_env, patch_environment
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import deepspeed
from transformers.utils import logging

from hfslim.anatomy.adapters import base_of
from hfslim.anatomy.layer_modules import modules_to_shard

__all__ = [
    "CONFIGURATIONS",
    "check_fsdp",
    "forget_trainers",
    "freeze_empty",
    "loading_whole",
    "save_where_asked",
    "shard_by_anatomy",
    "way_of",
    "whole",
]

logger = logging.get_logger(__name__)

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


def freeze_empty(model: Any) -> None:
    """Freeze parameters without elements, as of layers without heads, which FSDP2 cannot shard.

    accelerate would take those of an optimizer for one.
    """
    for parameter in _empty(model):
        parameter.requires_grad_(False)


def _empty(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if not parameter.numel()]


def shard_by_anatomy(accelerator: Accelerator) -> None:
    """Make FSDP2 shard the modules that `modules_to_shard` finds, in what is prepared from now on.

    accelerate (seen in 1.15) shards the classes of `_no_split_modules`, then what the model returns
    as its input embeddings, also where this lies in a sharded module, and fails.
    """
    plugin = accelerator.state.fsdp_plugin if getattr(accelerator, "is_fsdp2", False) else None
    if plugin is None:
        return
    if plugin.transformer_cls_names_to_wrap or plugin.min_num_params:
        logger.warning(
            "fsdp_transformer_layer_cls_to_wrap and fsdp_min_num_params are not used: hfslim's "
            "Trainers shard the layers that they find in the model"
        )
    prepare = accelerator._prepare_fsdp2

    def prepare_by_anatomy(*given: Any) -> Any:
        model: Any = next((one for one in given if isinstance(one, nn.Module)), None)
        if not isinstance(base_of(model), PreTrainedModel):
            return prepare(*given)
        empty = _empty(model)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        if plugin.cpu_ram_efficient_loading and (empty or set(model.state_dict()) - parameters):
            raise ValueError(
                "accelerate cannot send buffers, as of batch norms, or parameters without elements "
                "to the other processes: set fsdp_cpu_ram_efficient_loading: false"
            )
        mixed = plugin.mixed_precision_policy
        for parameter in empty:  # Left out, they are neither moved nor cast.
            parameter.data = parameter.to(accelerator.device, mixed and mixed.param_dtype)
        with _sharding(modules_to_shard(model), empty, model, plugin):
            return prepare(*given)

    accelerator._prepare_fsdp2 = prepare_by_anatomy


@contextmanager
def _sharding(
    modules: list[nn.Module], ignored: list[nn.Parameter], model: nn.Module, plugin: Any
) -> Iterator[None]:
    """Make accelerate shard exactly these modules, and the rest but the ignored as one."""
    chosen = set(modules)
    ignored_by_plugin = fsdp_utils.get_parameters_from_modules

    def left_out(*given: Any) -> set[nn.Parameter]:
        return {*ignored, *ignored_by_plugin(*given)}

    def policy(module: nn.Module) -> bool:
        return getattr(module, "_checkpoint_wrapped_module", module) in chosen

    def nothing(*_: Any) -> None:
        return None

    with (
        patch.object(plugin, "set_auto_wrap_policy", nothing),
        patch.object(fsdp_utils, "fsdp2_prepare_auto_wrap_policy", lambda *_: policy),
        patch.object(plugin, "ignored_modules", plugin.ignored_modules or []),
        patch.object(fsdp_utils, "get_parameters_from_modules", left_out),
        patch.object(fsdp_utils, "_find_final_norm", nothing, create=True),
        patch.object(model, "get_input_embeddings", nothing),
        patch.object(model, "get_output_embeddings", nothing),
    ):
        yield


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
