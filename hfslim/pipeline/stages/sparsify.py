"""The stage `sparsify`: set single weights to zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from hfslim.anatomy.weights import find_weights
from hfslim.pipeline.manifest import StageRecord
from hfslim.pipeline.stages.base import DDP_ONLY, LaunchNeed
from hfslim.pipeline.stages.taught import IN_ONE_GO, CutStage
from hfslim.pruning.in_training.schedules import Schedule
from hfslim.sparsity import sparsify
from hfslim.sparsity.oneshot import Method, check_scope
from hfslim.sparsity.weight_callback import TrainingMethod, WeightPruningCallback
from hfslim.sparsity.weight_masks import Scope, SparsityGoal

if TYPE_CHECKING:
    from hfslim.pipeline.run_state import RunState


@dataclass(frozen=True)
class Sparsify(CutStage):
    """Set single weights of the model to zero.

    By default `sparsegpt` chooses them for a cut in one go, `magnitude` for a gradual one.
    """

    name = "sparsify"
    makes_zeros = True
    sparsity: float | None = None
    pattern: str | None = None
    method: Method | TrainingMethod | None = None
    scope: Scope | None = None
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    max_examples: int = 512
    schedule: Schedule | None = None
    start: float = 0.0
    end: float = 0.5
    teacher: str | tuple[str, ...] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method is None:
            object.__setattr__(self, "method", "magnitude" if self.trains else "sparsegpt")
        SparsityGoal.parse(self.sparsity, self.pattern)
        if self.trains:
            self.callback()
        else:
            object.__setattr__(self, "scope", check_scope(str(self.method), self.scope))
        self.check_cut()

    def callback(self) -> WeightPruningCallback:
        """Return the callback that prunes while a Trainer trains."""
        return WeightPruningCallback(
            self.sparsity,
            self.pattern,
            method=self.method,  # type: ignore[arg-type]  # which the callback checks
            scope=self.scope or "global",
            schedule=self.schedule or "cubic",
            start=self.start,
            end=self.end,
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
        )

    def launch_needs(self) -> Iterable[LaunchNeed]:
        """Return that gradual sparsity needs whole parameters and gradients."""
        return (LaunchNeed("gradual sparsity", DDP_ONLY, IN_ONE_GO),)

    def check_model(self, state: RunState) -> None:
        """Refuse names of modules that the model does not have."""
        find_weights(state.load(new_head=True), self.target_modules, self.exclude_modules)

    def run(self, state: RunState, record: StageRecord, args: Any) -> None:
        """Sparsify, evaluate and save the model."""
        model: Any = state.load()
        if self.trains:
            state.train_and_save(self.trainer(state, model, args, self.callback()), record)
            return
        model.to(state.evaluation.device)
        sparsify(
            model,
            state.calibration(model, self.max_examples),
            self.sparsity,
            self.pattern,
            method=self.method,  # type: ignore[arg-type]  # which `__post_init__` has checked
            scope=self.scope,
            max_examples=self.max_examples,
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            progress=PartialState().is_main_process,
        )
        state.save_whole(model, record)
