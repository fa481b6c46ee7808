"""Run accelerate's FSDP2 on gloo processes without a GPU, under accelerate_configs/fsdp2.yaml.

accelerate takes the processes for those of an accelerator, and torch shards on a mesh of CPUs.
"""

import os
from typing import Any

import torch
import torch.distributed.fsdp as fsdp
import yaml
from accelerate import PartialState, state
from accelerate.utils import DistributedType
from places import ROOT
from torch.distributed.device_mesh import init_device_mesh


def enable(**changed: Any) -> None:
    """Set up this process before any Trainer is made; `changed` are keys of the configuration."""
    file = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text())
    for key, value in (file["fsdp_config"] | changed).items():
        os.environ[key.upper()] = str(value)
    os.environ.update(ACCELERATE_USE_FSDP="true", ACCELERATE_USE_CPU="true")
    set_up, shard = state.AcceleratorState.__init__, fsdp.fully_shard

    def as_accelerator(self: state.AcceleratorState, *args: Any, **kwargs: Any) -> None:
        fresh = not state.AcceleratorState._shared_state
        PartialState(cpu=True)
        if fresh:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        set_up(self, *args, **kwargs)

    def on_cpu(module: Any, **kwargs: Any) -> Any:
        if kwargs.get("mesh") is None:
            processes = torch.distributed.get_world_size()
            kwargs["mesh"] = init_device_mesh("cpu", (processes,))
        return shard(module, **kwargs)

    state.AcceleratorState.__init__ = as_accelerator  # type: ignore[method-assign]
    fsdp.fully_shard = on_cpu
