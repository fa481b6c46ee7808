"""Feature losses inside a Trainer: their projections in its optimizer and its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback

from hfslim.anatomy.adapters import base_of
from hfslim.distillation.config import DistillationConfig, parse_weights
from hfslim.distillation.losses.comparable import every_layer_runs
from hfslim.distillation.losses.feature_terms import FeatureTerms
from hfslim.distillation.losses.layer_maps import parse_map

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

__all__ = ["FeatureMixin"]


class FeatureMixin(_Base):
    """Keeps what feature losses need for the time of one training.

    Projections lie outside of the student: no pruning counts them, no wrapper sees them, no export
    holds them. They are in the optimizer, their gradients are averaged over processes, and
    checkpoints hold them.
    """

    args: DistillationConfig
    teacher: Any
    teachers: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.feature_weights = parse_weights(self.args.feature_losses)
        self.features: FeatureTerms | None = None
        self._projections: list[torch.nn.Parameter] = []
        # First, so that gates are still there when the map of layers is chosen.
        self.callback_handler.callbacks.insert(0, _EndOfStep(self))

    @contextmanager
    def feature_training(self) -> Iterator[None]:
        """Have the feature losses ready inside the block."""
        if not self.feature_weights:
            yield
            return
        self._check_feature_training()
        with every_layer_runs(base_of(self.model)):
            self.features = FeatureTerms(
                self.model,
                self.teacher,
                list(self.feature_weights),
                parse_map(self.args.layer_map),
                self.args.hidden_projection,
                self.args.relation_heads,
            )
            self._check_projections()
            try:
                yield
            finally:
                for capture in self.features.captures:
                    capture.release()
                self.features = None

    def _check_feature_training(self) -> None:
        if len(self.teachers.models) > 1:
            raise ValueError(
                f"feature_losses compare with one teacher, and there are "
                f"{len(self.teachers.models)}; name one, or distil from logits alone."
            )
        if self.teachers.prefixes[0] and not self.teachers.same_positions():
            raise ValueError(
                "feature_losses compare position by position, and the teacher's own processor "
                "makes other tokens or frames of an example than the student's; distil from "
                "logits alone, or from a teacher that reads the student's inputs."
            )
        if self.args.torch_compile:
            raise ValueError(
                "feature_losses record what layers compute, which torch.compile hides: set "
                "torch_compile=False, or distil from logits alone."
            )
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.fsdp_version == 1:
            raise ValueError(
                "feature_losses record layers as they are, and FSDP's first version wraps them: "
                "use the second (fsdp_version: 2), DDP or ZeRO, or distil from logits alone."
            )
        for model in (self.model, *self.teachers.models):
            if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
                raise ValueError(
                    f"{type(model).__name__} was built in the parts of ZeRO-3, and the probe of "
                    "feature_losses runs it whole: set zero3_init_flag: false in the accelerate "
                    "configuration, or build student and teacher before the arguments."
                )

    def _check_projections(self) -> None:
        if not self.features or not len(self.features.projections):
            return
        if self.lr_scheduler is not None and not self._created_lr_scheduler:
            raise ValueError(
                "hidden_projection adds its maps to the optimizer, which the scheduler that was "
                "passed with it does not know: pass optimizers=(optimizer, None)."
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "hidden_projection trains maps outside of the student, and an optimizer under "
                "DeepSpeed or FSDP takes the student's parameters alone: use a teacher of the "
                "student's width, minilm_v2, or DDP."
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Build the optimizer of the student and of the projections of its hidden states."""
        optimizer = super().create_optimizer(*args, **kwargs)
        projections = list(self.features.projections.parameters()) if self.features else []
        # An earlier training of this Trainer had maps of its own.
        old = {id(parameter) for parameter in self._projections}
        groups = optimizer.param_groups
        groups[:] = [g for g in groups if not any(id(p) in old for p in g["params"])]
        for parameter in self._projections:
            optimizer.state.pop(parameter, None)
        if projections:
            optimizer.add_param_group({"params": projections, "weight_decay": 0.0})
        self._projections = projections
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.features is not None and self.args.should_save:
            self.features.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.features is not None and checkpoint is not None:
            self.features.load(checkpoint)


class _EndOfStep(TrainerCallback):
    """Tells a trainer's feature losses that the gradients of a step are complete."""

    def __init__(self, trainer: FeatureMixin) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Average what lies outside of the wrapped model, and choose the next layer map."""
        if self.trainer.features is not None:
            self.trainer.features.end_step(self.trainer.accelerator)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Forget the projections' gradients; the Trainer forgets those of its own model alone."""
        if self.trainer.features is not None:
            self.trainer.features.projections.zero_grad()
