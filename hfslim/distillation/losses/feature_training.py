"""Feature losses in a Trainer: optimizer, checkpoints and the end of each step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from hfslim.anatomy.adapters import base_of
from hfslim.distillation.config import DistillationConfig, parse_weights
from hfslim.distillation.losses.comparable import every_layer_runs
from hfslim.distillation.losses.feature_terms import FeatureTerms
from hfslim.distillation.losses.layer_maps import parse_map

__all__ = ["FeatureTraining"]


class FeatureTraining(TrainerCallback):
    """Holds the feature losses of a Trainer, one set of terms for each training.

    Projections are outside of the student: pruning does not count them, exports do not hold them.
    They are in the optimizer, their gradients are averaged over processes, and checkpoints hold
    them. As a callback it must come first, so that gates are still there when the layer map is
    chosen.

    Args:
        trainer: The Trainer, with `model`, `teachers` and `args`.

    Attributes:
        weights: The weight of each loss by its name; empty without feature losses.
        terms: The terms of the current training; None outside of a training.
    """

    def __init__(self, trainer: Any) -> None:
        args: DistillationConfig = trainer.args
        self.trainer = trainer
        self.weights = parse_weights(args.feature_losses)
        self.terms: FeatureTerms | None = None
        self._in_optimizer: list[nn.Parameter] = []

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Build the terms for the training inside the block.

        Raises:
            ValueError: The models, their inputs or the launch do not allow feature losses.
        """
        if not self.weights:
            yield
            return
        self._check()
        trainer, args = self.trainer, self.trainer.args
        with every_layer_runs(base_of(trainer.model)):
            self.terms = FeatureTerms(
                trainer.model,
                trainer.teacher,
                list(self.weights),
                parse_map(args.layer_map),
                args.hidden_projection,
                args.relation_heads,
            )
            try:
                self._check_projections()
                yield
            finally:
                for capture in self.terms.captures:
                    capture.release()
                self.terms = None

    def add_to(self, optimizer: Optimizer) -> None:
        """Put the projections into the optimizer, in place of those of an earlier training."""
        old = {id(parameter) for parameter in self._in_optimizer}
        groups = optimizer.param_groups
        groups[:] = [g for g in groups if not any(id(p) in old for p in g["params"])]
        for parameter in self._in_optimizer:
            optimizer.state.pop(parameter, None)
        self._in_optimizer = list(self.terms.projections.parameters()) if self.terms else []
        if self._in_optimizer:
            optimizer.add_param_group({"params": self._in_optimizer, "weight_decay": 0.0})

    def save(self, folder: str | Path) -> None:
        """Write the terms' state into a checkpoint."""
        if self.terms is not None and self.trainer.args.should_save:
            self.terms.save(folder)

    def load(self, folder: str | Path | None) -> None:
        """Read the terms' state from a checkpoint, if there is one."""
        if self.terms is not None and folder is not None:
            self.terms.load(folder)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Average the projections' gradients over processes, and choose the next layer map."""
        if self.terms is not None:
            self.terms.end_step(self.trainer.accelerator)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Clear the projections' gradients; the Trainer clears those of its model only."""
        if self.terms is not None:
            self.terms.projections.zero_grad()

    def _check(self) -> None:
        trainer, teachers = self.trainer, self.trainer.teachers
        if len(teachers.models) > 1:
            raise ValueError(
                f"feature_losses compare with one teacher, and there are "
                f"{len(teachers.models)}; name one, or distil from logits alone."
            )
        if teachers.prefixes[0] and not teachers.same_positions():
            raise ValueError(
                "feature_losses compare position by position, and the teacher's own processor "
                "makes other tokens or frames of an example than the student's; distil from "
                "logits alone, or from a teacher that reads the student's inputs."
            )
        if trainer.args.torch_compile:
            raise ValueError(
                "feature_losses record the outputs of layers, which torch.compile hides: set "
                "torch_compile=False, or distil from logits alone."
            )
        plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
        if plugin is not None and plugin.fsdp_version == 1:
            raise ValueError(
                "feature_losses record layers directly, and FSDP's first version wraps them: "
                "use the second (fsdp_version: 2), DDP or ZeRO, or distil from logits alone."
            )
        for model in (trainer.model, *teachers.models):
            if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
                raise ValueError(
                    f"{type(model).__name__} was built in the parts of ZeRO-3, and the probe of "
                    "feature_losses runs it whole: set zero3_init_flag: false in the accelerate "
                    "configuration, or build student and teacher before the arguments."
                )

    def _check_projections(self) -> None:
        trainer = self.trainer
        if self.terms is None or not len(self.terms.projections):
            return
        if trainer.lr_scheduler is not None and not trainer._created_lr_scheduler:
            raise ValueError(
                "hidden_projection adds its maps to the optimizer, and the scheduler that was "
                "passed has no learning rate for them: pass optimizers=(optimizer, None)."
            )
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ValueError(
                "hidden_projection trains maps outside of the student, and an optimizer under "
                "DeepSpeed or FSDP takes the student's parameters alone: use a teacher of the "
                "student's width, minilm_v2, or DDP."
            )
