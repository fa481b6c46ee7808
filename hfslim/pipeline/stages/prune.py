"""The stage `prune`: remove units of the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.structure import Kind
from hfslim.pipeline.manifest import StageRecord
from hfslim.pipeline.stages.base import DDP_ONLY, LaunchNeed
from hfslim.pipeline.stages.taught import IN_ONE_GO, CutStage
from hfslim.pruning import Batches, PruningCallback, prune
from hfslim.pruning.in_training.schedules import Schedule
from hfslim.pruning.obs.reconstruction import Reconstruction, check_reconstruction
from hfslim.pruning.scores.criteria import Criteria, criteria_by_kind, learns, usual_criterion
from hfslim.pruning.search.search import Search
from hfslim.pruning.steps import check_prunable, check_reachable
from hfslim.pruning.target import Target
from hfslim.reporting.unit_rows import unit_rows

if TYPE_CHECKING:
    from hfslim.pipeline.run_state import RunState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prune(CutStage):
    """Remove units of the model.

    The target is a fraction of the cost of a forward pass of `batch_size` examples. By default a
    cut in one go scores units by `obs` and reconstructs weights; a gradual one scores by `fisher`
    and reconstructs nothing. Dimensions are always scored by `fisher` by default.
    """

    name = "prune"
    target: Mapping[str, Any]
    units: tuple[Kind, ...] = ("heads", "neurons")
    criterion: Criteria | None = None
    reconstruction: Reconstruction | None = None
    max_examples: int = 512
    batch_size: int = 1
    schedule: Schedule | None = None
    start: float = 0.0
    end: float = 0.5
    teacher: str | tuple[str, ...] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Target.parse(self.target, self.units)
        when = "training" if self.trains else "calibration"
        if self.criterion is None:
            object.__setattr__(self, "criterion", usual_criterion(self.units, when))
        assert self.criterion is not None
        criteria = criteria_by_kind(self.criterion, self.units, when)
        pace = self.check_cut()
        if learns(criteria):
            pace.check_learned()
        if self.reconstruction is None:
            object.__setattr__(self, "reconstruction", "none" if self.trains else "weights")
        assert self.reconstruction is not None
        check_reconstruction(self.reconstruction)
        if self.trains and self.reconstruction != "none":
            raise ValueError(
                f"reconstruction {self.reconstruction!r} is for a cut in one go: a gradual one "
                "recovers by training"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def __str__(self) -> str:
        if self.trains:
            how = "gradually while training"
        else:
            how = (
                f"in one go, from up to {self.max_examples} examples on each process; "
                f"reconstruction: {self.reconstruction}"
            )
        return f"pruning to {dict(self.target)} by criterion {self.criterion}, {how}"

    def launch_needs(self) -> Iterator[LaunchNeed]:
        """Yield what gradual pruning needs, and more for a learned criterion."""
        assert self.criterion is not None
        if learns(criteria_by_kind(self.criterion, self.units, "training")):
            yield LaunchNeed(f"criterion {self.criterion!r}", DDP_ONLY, IN_ONE_GO)
        yield from super().launch_needs()

    def check_model(self, state: RunState) -> None:
        """Refuse a target that the model cannot reach.

        Only the recipe's first `prune` stage is checked: the later ones prune another model. A
        latency is measured by the first process for all.
        """
        if self is not next(one for one in state.recipe.stages if one.name == self.name):
            return
        model: Any = state.load(new_head=True)
        model.to(state.evaluation.device)
        check_prunable(model)
        units = find_units(model, "dimensions" in self.units).of(self.units)
        target, inputs = Target.parse(self.target, self.units), state.inputs(model, self.batch_size)
        shown = PartialState().is_main_process
        check_reachable(Search.priced(model, units, target, inputs, progress=shown))

    def run(self, state: RunState, record: StageRecord, args: Any) -> None:
        """Prune, evaluate and save the model; record which units stay."""
        model: Any = state.load()
        target = dict(self.target)
        shared: dict[str, Any] = {
            "units": self.units,
            "criterion": self.criterion,
            "inputs": state.inputs(model, self.batch_size),
            "seed": state.recipe.seed,
        }
        logger.info("%s", self)
        if self.trains:
            schedule = self.schedule or "cubic"
            callback = PruningCallback(
                target, schedule=schedule, start=self.start, end=self.end, **shared
            )
            state.train_and_save(self.trainer(state, model, args, callback), record)
            structure, scores = callback.structure, callback.scores
            if structure is None:
                raise RuntimeError("training ended before pruning began")
        else:
            model.to(state.evaluation.device)
            result = prune(
                model,
                Batches(state.calibration(model, self.max_examples), self.max_examples),
                target,
                reconstruction=self.reconstruction or "weights",
                progress=PartialState().is_main_process,
                **shared,
            )
            state.save_whole(model, record)
            structure, scores = result.structure, result.scores
        record.structure, record.units = structure.table(), unit_rows(structure, scores)
