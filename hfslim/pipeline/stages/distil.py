"""The stages `distil` and `recover`: train on the outputs of teachers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hfslim.pipeline.manifest import StageRecord
from hfslim.pipeline.stages.base import CUTS, DDP_OR_ZERO2, LaunchNeed, Stage, check_rank
from hfslim.pipeline.stages.taught import TaughtStage
from hfslim.training.transfer import with_lora

if TYPE_CHECKING:
    from hfslim.pipeline.run_state import RunState


@dataclass(frozen=True)
class Distil(TaughtStage):
    """Train the model on the outputs of one or several teachers and on the labels.

    With `lora_rank`, adapters of that rank and the head train; the adapters are merged into the
    weights at the end.
    """

    name = "distil"
    takes_untrained = True
    teacher: str | tuple[str, ...] | None = None
    lora_rank: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_rank(self.lora_rank)

    def launch_needs(self) -> Iterator[LaunchNeed]:
        """Yield what adapters need."""
        if self.lora_rank is not None:
            yield LaunchNeed("lora_rank", DDP_OR_ZERO2)

    def check_place(self, before: Sequence[Stage], teacher: bool) -> None:
        """Refuse the stage if neither it nor the recipe names a teacher."""
        if not (self.teacher or teacher):
            raise ValueError("no teacher; set `teacher`")

    def run(self, state: RunState, record: StageRecord, args: Any) -> None:
        """Train, evaluate and save the model."""
        model: Any = state.load(new_head=self.takes_untrained)
        if self.lora_rank is not None:
            model = with_lora(model, self.lora_rank)
        state.train_and_save(self.trainer(state, model, args), record)


@dataclass(frozen=True)
class Recover(Distil):
    """Train the cut model on the outputs of the model before its first cut, or of named teachers.

    `lora_rank` is that of `distil`.
    """

    name = "recover"
    takes_untrained = False

    def check_place(self, before: Sequence[Stage], teacher: bool) -> None:
        """Refuse the stage if there is neither a cut before it nor a teacher."""
        if not (self.teacher or teacher or any(stage.cuts for stage in before)):
            raise ValueError(f"no teacher; set `teacher`, or put {CUTS} before it")
