"""Base classes of the stages that train with a teacher, and of those that cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import TrainerCallback

from hfslim.distillation import DistillationConfig, DistillationTrainer
from hfslim.pipeline.opening import sources_of
from hfslim.pipeline.stages.base import DDP_OR_ZERO2, LaunchNeed, Stage
from hfslim.pruning.in_training.schedules import Pace, Schedule

if TYPE_CHECKING:
    from hfslim.pipeline.run_state import RunState

IN_ONE_GO = (
    "; or cut in one go, without schedule, num_train_epochs and max_steps, and recover after it"
)


class TaughtStage(Stage):
    """A stage that trains on the outputs of one or several teachers and on the labels."""

    arguments: ClassVar[type | None] = DistillationConfig
    teacher: str | tuple[str, ...] | None
    training: Mapping[str, Any]

    @property
    def taught(self) -> bool:
        """Whether the model learns from a teacher."""
        return self.trains

    @property
    def named_teachers(self) -> tuple[str, ...]:
        """The teachers that the recipe names for this stage."""
        return sources_of(self.teacher)

    def teachers(self, state: RunState) -> tuple[str, ...]:
        """Return the stage's teachers, else the recipe's, else the model before its first cut."""
        return self.named_teachers or sources_of(state.recipe.teacher or state.whole)

    def trainer(
        self, state: RunState, model: Any, args: Any, *callbacks: TrainerCallback
    ) -> DistillationTrainer:
        """Return a Trainer that distils the teachers into a model."""
        sources = self.teachers(state)
        parts = state.taught_parts(sources)
        parts["teacher"] = [
            state.teacher(one, model, args.allow_untrained_teacher) for one in sources
        ]
        return DistillationTrainer(model=model, args=args, callbacks=[*callbacks], **parts)


class CutStage(TaughtStage):
    """A stage that removes units or weights: in one go, or gradually while the model trains.

    The cut is gradual if `schedule`, `num_train_epochs` or `max_steps` is given.
    """

    cuts = True
    max_examples: int
    schedule: Schedule | None
    start: float
    end: float

    @property
    def trains(self) -> bool:
        """Whether the cut is gradual."""
        return self.schedule is not None or bool(
            {"num_train_epochs", "max_steps"} & set(self.training)
        )

    def teachers(self, state: RunState) -> tuple[str, ...]:
        """Return the teachers; the current model if there is no other."""
        return super().teachers(state) or sources_of(state.source)

    def launch_needs(self) -> Iterable[LaunchNeed]:
        """Return that gradual pruning needs whole parameters."""
        return (LaunchNeed("gradual pruning", DDP_OR_ZERO2, IN_ONE_GO),)

    def check_cut(self) -> Pace:
        """Check the keys that all cuts share, and return the pace of a gradual one."""
        if self.max_examples < 1:
            raise ValueError(f"max_examples must be at least 1, got {self.max_examples}")
        if self.training and not self.trains:
            raise ValueError(
                f"{sorted(self.training)} need training: add num_train_epochs for gradual pruning, "
                "or move them to a `recover` stage"
            )
        return Pace(self.schedule or "cubic", self.start, self.end, None)
