"""The stage `measure`: compare the model with the one before its first cut."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from hfslim.measuring.measurement import compare
from hfslim.pipeline.manifest import StageRecord
from hfslim.pipeline.run_report import evaluate_pair, run_report
from hfslim.pipeline.stages.base import CUTS, Stage

if TYPE_CHECKING:
    from hfslim.pipeline.run_state import RunState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measure(Stage):
    """Compare the model with the one before its first cut, or a teacher, and write the report."""

    name = "measure"
    makes_model = False
    batch_sizes: tuple[int, ...] = (1, 32)
    length: int | None = None

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes must be 1 or more, got {list(self.batch_sizes)}")
        if self.length is not None and self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")

    def check_place(self, before: Sequence[Stage], teacher: bool) -> None:
        """Refuse the stage if there is no model to compare with."""
        if not (teacher or any(stage.cuts or stage.named_teachers for stage in before)):
            raise ValueError(f"nothing to compare with; put {CUTS} before it, or set `teacher`")

    def check_model(self, state: RunState) -> None:
        """Refuse a length that the model has no positions for."""
        if self.length is not None:
            state.inputs(state.load(new_head=True), 1, self.length)

    def run(self, state: RunState, record: StageRecord, args: Any) -> None:
        """Evaluate both models, measure their costs on the first process and write the report."""
        pair = evaluate_pair(state)
        assert pair.before is not None  # which `check_place` has checked
        if not PartialState().is_main_process:
            return
        device, comparisons = state.evaluation.device, []
        before: Any = pair.before
        after: Any = pair.after
        for model in (before, after):
            model.to(device=device)
        for size in self.batch_sizes:
            logger.info("measuring at batch %d on %s", size, device)
            inputs = state.inputs(after, size, self.length)
            theirs = inputs if pair.processor is None else state.inputs(before, size, self.length)
            comparisons.append(compare(before, after, inputs, before_inputs=theirs))
        report = run_report(state, pair, comparisons)
        report.print()
        report.write(state.folder_of(record))
        logger.info("report in %s", state.folder_of(record))
