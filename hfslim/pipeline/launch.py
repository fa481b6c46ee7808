"""Which stages a launch can run: told before anything is trained."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainingArguments

from hfslim.pipeline.stages import Distil, Prune, Recover, Sparsify, Stage, Transfer
from hfslim.pipeline.task_examples import uses_cpu
from hfslim.pruning.scores.criteria import criteria_by_kind, learns
from hfslim.training.parallel import CONFIGURATIONS, check_fsdp, way_of

__all__ = ["check_folder", "check_launch", "launch_arguments"]

_PRECISIONS = ("bf16", "fp16")
_IN_ONE_GO = (
    "; or cut in one go, without schedule, num_train_epochs and max_steps, and recover after it"
)


class _Need(NamedTuple):
    """What of a stage needs one of some ways to train, and what else could be done."""

    what: str
    ways: tuple[str, ...]
    otherwise: str = ""


def launch_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of a Trainer, with what the launch says where they say nothing."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    says = {"use_cpu": uses_cpu()}
    if precision in _PRECISIONS and not set(_PRECISIONS) & set(given):
        says[precision] = True
    return {**says, **given}


def check_launch(plan: Sequence[tuple[Stage, TrainingArguments | None]]) -> None:
    """Refuse stages that need whole what the launch keeps in parts.

    Args:
        plan: The stages, and the arguments of those that train.

    Raises:
        ValueError: Naming the stage, and the launch configurations that can run it.
    """
    sparse = False
    for number, (stage, args) in enumerate(plan, 1):
        for need in _needs(stage, args, sparse):
            assert args is not None
            if way_of(args) not in need.ways:
                files = " or ".join(f"accelerate_configs/{CONFIGURATIONS[w]}" for w in need.ways)
                raise ValueError(
                    f"stages[{number}] {stage.name}: {need.what} cannot be trained under "
                    f"{way_of(args)}: launch with {files}{need.otherwise}"
                )
        if args is not None:
            check_fsdp(args)
        sparse = sparse or isinstance(stage, Sparsify)


def check_folder(folder: Path, args: TrainingArguments) -> None:
    """Refuse a folder of results that several machines should share and do not, or the reverse.

    Every process calls this.

    Args:
        folder: It is made if it is not there.
        args: Whose `save_on_each_node` tells whether each machine has a folder of its own.

    Raises:
        ValueError: With what to set.
    """
    process, machine = PartialState(), int(os.environ.get("GROUP_RANK", "0"))
    if process.num_processes == int(os.environ.get("LOCAL_WORLD_SIZE", process.num_processes)):
        return
    # A name that no machine has asked for, so that none remembers that it is not there.
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


def _needs(stage: Stage, args: TrainingArguments | None, sparse: bool) -> Iterator[_Need]:
    if args is None:
        return
    whole, nearly = ("DDP",), ("DDP", "ZeRO-2")
    if sparse:
        yield _Need("the zeros that were made before it", whole)
    if isinstance(stage, Transfer):
        if stage.l2_sp:
            yield _Need("l2_sp", whole)
        if stage.method == "gradual":
            yield _Need("method 'gradual'", whole)
        if stage.method == "lora":
            yield _Need("method 'lora'", nearly)
    elif isinstance(stage, Sparsify):
        yield _Need("gradual sparsity", whole, _IN_ONE_GO)
    elif isinstance(stage, Prune):
        assert stage.criterion is not None
        if learns(criteria_by_kind(stage.criterion, stage.units, "training")):
            yield _Need(f"criterion {stage.criterion!r}", whole, _IN_ONE_GO)
        yield _Need("gradual pruning", nearly, _IN_ONE_GO)
    elif isinstance(stage, Distil | Recover) and stage.lora_rank is not None:
        yield _Need("lora_rank", nearly)
    if getattr(args, "feature_losses", None):
        yield _Need("feature_losses", (*nearly, "ZeRO-3"))
