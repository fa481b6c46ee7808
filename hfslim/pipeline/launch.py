"""Checks of a launch, before anything is trained: its stages, and its folder of results."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainingArguments

from hfslim.pipeline.stages import LaunchNeed, Stage
from hfslim.pipeline.stages.base import DDP_ONLY, DDP_OR_ZERO2
from hfslim.pipeline.task_examples import uses_cpu
from hfslim.training.parallel import CONFIGURATIONS, check_fsdp, way_of

__all__ = ["check_folder", "check_launch", "launch_arguments"]

PRECISIONS = ("bf16", "fp16")


def launch_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of a Trainer, completed by the device and the precision of the launch."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    defaults = {"use_cpu": uses_cpu()}
    if precision in PRECISIONS and not set(PRECISIONS) & set(given):
        defaults[precision] = True
    return {**defaults, **given}


def check_launch(plan: Sequence[tuple[Stage, TrainingArguments | None]]) -> None:
    """Refuse stages that cannot train under the launch; `plan` has the arguments of each.

    Raises:
        ValueError: Naming the stage, and the launch configurations that can run it.
    """
    sparse = False
    for number, (stage, args) in enumerate(plan, 1):
        if args is not None:
            needs = [*stage.launch_needs()]
            if sparse:
                needs.insert(0, LaunchNeed("the zeros that were made before it", DDP_ONLY))
            if getattr(args, "feature_losses", None):
                needs.append(LaunchNeed("feature_losses", (*DDP_OR_ZERO2, "ZeRO-3")))
            way = way_of(args)
            for need in needs:
                if way not in need.ways:
                    files = " or ".join(
                        f"accelerate_configs/{CONFIGURATIONS[one]}" for one in need.ways
                    )
                    raise ValueError(
                        f"stages[{number}] {stage.name}: {need.what} cannot be trained under "
                        f"{way}: launch with {files}{need.otherwise}"
                    )
            check_fsdp(args)
        sparse = sparse or stage.makes_zeros


def check_folder(folder: Path, args: TrainingArguments) -> None:
    """Check that machines share a folder, or that they do not if `save_on_each_node` is set.

    Every process calls this. The folder is made if it does not exist.

    Raises:
        ValueError: Naming the key to set.
    """
    process, machine = PartialState(), int(os.environ.get("GROUP_RANK", "0"))
    if process.num_processes == int(os.environ.get("LOCAL_WORLD_SIZE", process.num_processes)):
        return
    # A new name, so that no machine has cached that the file does not exist.
    token = folder / f".{broadcast_object_list([uuid.uuid4().hex])[0]}"
    if process.is_local_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    process.wait_for_everyone()
    if process.is_main_process:
        token.touch()
    process.wait_for_everyone()
    seen = [there for other, there in gather_object([(machine > 0, token.exists())]) if other]
    if process.is_main_process:
        token.unlink()
    if not all(seen) and not args.save_on_each_node:
        raise ValueError(
            f"the machines of this launch do not share {folder.absolute()}: set output_dir to a "
            "folder that they share, or training.save_on_each_node to true"
        )
    if any(seen) and args.save_on_each_node:
        raise ValueError(
            f"the machines of this launch share {folder.absolute()}, where they would overwrite "
            "each other's files: leave out save_on_each_node"
        )
