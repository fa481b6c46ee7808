"""The stage `student`: take some of the model's units as a student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from hfslim.distillation.student import student_structure
from hfslim.pipeline.manifest import StageRecord
from hfslim.pipeline.stages.base import Stage
from hfslim.pruning import shrink

if TYPE_CHECKING:
    from hfslim.pipeline.run_state import RunState


@dataclass(frozen=True)
class Student(Stage):
    """Take some of the model's own layers, heads, neurons and dimensions as a student.

    `layers` is a number of evenly spaced layers, or a list of layer numbers. Units are scored by
    `fisher`. In a `recover` stage the student then learns from the model that it was taken from.
    """

    name = "student"
    cuts = True
    layers: int | tuple[int, ...] | None = None
    heads: int | None = None
    neurons: int | None = None
    dimensions: int | None = None
    max_examples: int = 512

    def __post_init__(self) -> None:
        if not any(self.sizes.values()):
            raise ValueError("give layers, heads, neurons or dimensions: what the student has")
        if self.max_examples < 1:
            raise ValueError(f"max_examples must be at least 1, got {self.max_examples}")

    @property
    def sizes(self) -> dict[str, Any]:
        """The layers, heads, neurons and dimensions of the student."""
        names = ("layers", "heads", "neurons", "dimensions")
        return {name: getattr(self, name) for name in names}

    def check_model(self, state: RunState) -> None:
        """Refuse a student that is no part of the model."""
        student_structure(state.load(new_head=True), **self.sizes)

    def run(self, state: RunState, record: StageRecord, args: Any) -> None:
        """Make, evaluate and save the student; record which units it has."""
        model: Any = state.load()
        model.to(state.evaluation.device)
        structure = student_structure(
            model,
            **self.sizes,
            data=state.calibration(model, self.max_examples),
            max_examples=self.max_examples,
            progress=PartialState().is_main_process,
        )
        record.structure = structure.table()
        state.save_whole(shrink(model, structure), record)
