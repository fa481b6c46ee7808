"""Prune while training: a callback for any Trainer, the stock one too."""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments
from transformers.trainer_callback import ExportableState

from hfslim.anatomy.adapters import check_merged
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import Stated
from hfslim.anatomy.structure import Kind, Structure
from hfslim.pruning.gates.gates import Gates, Key
from hfslim.pruning.in_training.expected_cost import ExpectedCost
from hfslim.pruning.in_training.learned_gates import WARM_UP, LearnedGates
from hfslim.pruning.in_training.schedules import Pace, Schedule
from hfslim.pruning.scores.collect import Collector
from hfslim.pruning.scores.criteria import Criteria, criteria_by_kind, learns
from hfslim.pruning.scores.importance import Scores
from hfslim.pruning.search.search import Search
from hfslim.pruning.steps import agreed, check_reachable
from hfslim.pruning.surgery.proof import check_gates
from hfslim.pruning.surgery.surgery import shrink
from hfslim.pruning.target import Target
from hfslim.training.callback_requirements import (
    CUT_AFTER,
    average_over_processes,
    check_not_compiled,
    check_saved_between_steps,
    check_unscaled,
    check_whole_parameters,
    saved_state,
)
from hfslim.training.log_figures import FiguresCallback
from hfslim.training.ranks import rank

logger = logging.getLogger(__name__)


class PruningCallback(FiguresCallback, ExportableState):
    """Prunes gradually while a Trainer trains, then shrinks the model.

    Units are scored by the gradients of the training itself, summed over the examples of all
    processes; at each decision more gates close, and none opens again. Shapes change only when
    training has ended: `trainer.model` is then the small model, `trainer.save_model()` saves it,
    and further training needs a new Trainer. Checkpoints hold the whole model with its gates, and
    resume exactly, with the same callback; without it the stock Trainer would bring the removed
    units back, `SlimTrainer` and `DistillationTrainer` refuse. The best model is tracked from the
    last decision on. An error in training leaves the gates in the model until the next training
    with a PruningCallback begins.

    Args:
        target: What to keep, as for `prune`.
        units: Kinds of units that may go.
        criterion: How units are scored, as for `prune`; or `l0`: the gates are learned beside the
            weights, by hard-concrete noise and a Lagrangian whose target comes down along the
            schedule, and at the end those likeliest to be open stay, as many as the target allows.
        schedule: `cubic` (most of it early) or `linear`, in twenty decisions; `iterative`, in four,
            with a quarter of the time from start to end between two of them; or `oneshot`.
        start: When pruning begins, as a fraction of the training steps.
        end: When the target is met, as a fraction of the training steps; the rest is recovery.
        interval: Optimizer steps between decisions; by default the schedule's.
        inputs: The input at which multiply-accumulates are counted, as for `prune`.
        seed: Seed of random scores.

    Raises:
        ValueError: An argument is out of range; or, when training begins, it is by fp16, FSDP,
            ZeRO-3, torch.compile or several GPUs in one process, or the checkpoint is of another
            callback.
        UnreachableTargetError: When training begins, the target is below what can be reached.
        RuntimeError: When training begins, the model does not run some units as modules, or runs
            them more than once.

    Attributes:
        structure: The units that are kept, by their numbers before any cut; None before training.
        scores: What the last decision went by, `[units]` by kind and site; None before the first.
    """

    def __init__(
        self,
        target: Mapping[str, Any],
        units: Sequence[Kind] = ("heads", "neurons"),
        criterion: Criteria = "fisher",
        schedule: Schedule = "cubic",
        start: float = 0.0,
        end: float = 0.5,
        interval: int | None = None,
        inputs: Stated | None = None,
        seed: int = 0,
    ) -> None:
        self._pace = Pace(schedule, start, end, interval)
        self.goal = Target.parse(target, units)
        self.criteria = criteria_by_kind(criterion, units, "training")
        self._learns = learns(self.criteria)
        if self._learns:
            self._pace.check_learned()
        self.structure: Structure | None = None
        self.scores: Mapping[Key, torch.Tensor] | None = None
        self._arguments: dict[str, Any] = {
            "target": dict(target),
            "units": list(units),
            "criterion": criterion if isinstance(criterion, str) else dict(criterion),
            "schedule": schedule,
            "start": start,
            "end": end,
            "interval": interval,
            "inputs": inputs and {name: list(_shape(value)) for name, value in inputs.items()},
            "seed": seed,
        }
        self._inputs, self._seed = inputs, seed
        self._learned: LearnedGates | None = None
        self._collector: Collector = None  # type: ignore[assignment]  # made when training begins

    def on_train_begin(  # type: ignore[override]  # the Trainer always passes the model
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **_: Any,
    ) -> None:
        """Gate the model, and take up a saved state where training resumes."""
        _check_arguments(args, learns=self._learns)
        average_over_processes(args)
        check_merged(model)
        kinds = self._arguments["units"]
        units = find_units(model, "dimensions" in kinds).of(kinds)
        self._search = Search.priced(model, units, self.goal, self._inputs)
        if self._search.price.resource != self.goal.resource:
            coupled = " and ".join(sorted({site.kind for site in units if site.coupled}))
            raise ValueError(
                f"there is no latency table for {coupled} to go by while a model trains: give "
                'target={"macs": …}, or cut in one go by hfslim.prune, which times what it cuts'
            )
        check_reachable(self._search)
        self._decisions = self._pace.over(state.max_steps)
        check_gates(model, units)
        gates = Gates(model, units, owner=type(self).__name__)
        self._collector = Collector(gates, self.criteria, mean_loss=True)
        self._decided = False
        self.structure, self.scores = units.full(), None
        self._learned = None
        if self._learns and state.global_step < self._decisions.last:
            cost = ExpectedCost(units, self.goal, self._search.price)
            self._learned = LearnedGates(gates, cost, self._seed, self._decisions.steps)
        if state.global_step:
            self._restore(state)
        gates.set(agreed(self.structure))
        gates.attach()

    def on_step_begin(self, args: Arguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Score, or draw gates, while there is something left to decide."""
        if not self._decisions.first <= state.global_step < self._decisions.last:
            return
        if self._learned is not None:
            self._learned.draw(state.global_step)
            return
        if self._decided:
            self._collector.renew()
            self._decided = False
        self._collector.start()

    def on_pre_optimizer_step(
        self, args: Arguments, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        """Let the gates learn from the gradients of the step."""
        if self._learned is not None and self._learned.drawn:
            self._learned.learn(
                self.goal.at(self._decisions.progress(state.global_step + 1, WARM_UP))
            )

    def on_step_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close more gates when a decision is due."""
        self._collector.stop()
        progress = self._decisions.after(state.global_step)
        if self._learned is not None and state.global_step < self._decisions.last:
            self._learned.rest()
        elif progress is not None:
            self._decide(state, progress, kwargs["model"])
        self._before_save(control)

    def on_epoch_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Gather the scores of all ranks if a checkpoint follows."""
        self._before_save(control)

    def figures(self) -> dict[str, float]:
        """Return the fractions of units kept, or likely to be."""
        if self._learned is not None:
            return {f"expected_{name}": part for name, part in self._learned.expected().items()}
        counts = {} if self.structure is None else self.structure.counts()
        return {f"kept_{kind}": here / total for kind, (here, total) in counts.items()}

    def on_train_end(  # type: ignore[override]
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **_: Any,
    ) -> None:
        """Shrink the model."""
        if state.global_step < self._decisions.last:
            self._decide_early(state, model)
        self._collector.gates.detach()
        assert self.structure is not None
        shrink(model, self.structure)

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes into a checkpoint."""
        saved = None
        if self.structure is not None:
            scores = self._collector.scores
            saved = {
                "structure": self.structure.to_dict(),
                "decided": self._decided,
                "count": scores.count,
                "sums": _packed(scores.sums),
                "scores": self.scores and _packed(self.scores),
                "learned": self._learned and self._learned.state(),
            }
        return {"args": self._arguments, "attributes": {"saved": saved}}

    def _restore(self, state: TrainerState) -> None:
        saved = saved_state(state, type(self).__name__, self._arguments)
        self.structure = Structure.from_dict(saved["structure"])
        self._decided = saved["decided"]
        self.scores = saved["scores"] and _unpacked(saved["scores"])
        if self._learned is not None:
            self._learned.restore(saved["learned"])
            self._learned.rest()
        if rank() == 0:
            self._collector.scores = Scores(_unpacked(saved["sums"]), saved["count"])

    def _before_save(self, control: TrainerControl) -> None:
        """Give rank 0, which writes the checkpoint, the scores of all; the sum over ranks stays."""
        if control.should_save or control.should_evaluate:
            total = self._collector.scores.reduce()
            self._collector.reset()
            if rank() == 0:
                self._collector.scores = total

    def _decide(self, state: TrainerState, progress: float, model: PreTrainedModel) -> None:
        gates = self._collector.gates
        if self._learned is not None:
            scores = self._learned.scores()
            logger.info("step %d: gates leave %s", state.global_step, self._learned.expected())
            self._learned, gates.factors = None, {}
        else:
            scores = self._collector.result(model, self._seed)
        search = replace(self._search, target=self.goal.at(progress))
        self.scores = scores
        new = agreed(search.structure(scores, self.structure))
        self._decided = True
        if new != self.structure:
            self.structure = new
            gates.set(new)
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
            logger.info("step %d: keeps %s (%s)", state.global_step, new, new.digest())

    def _decide_early(self, state: TrainerState, model: PreTrainedModel) -> None:
        if self._learned is not None:
            blind = state.global_step <= self._decisions.first
        else:
            blind = self._collector.needs_data and not self._collector.scores.reduce().count
        if blind:
            logger.warning(
                "training stopped at step %d, before the first score at step %d: the model is not "
                "pruned; train for longer, or prune it with `hfslim.prune`",
                state.global_step,
                self._decisions.first + 1,
            )
            return
        logger.warning(
            "training stopped at step %d, before the target was due at step %d: pruning to the "
            "target now, without recovery",
            state.global_step,
            self._decisions.last,
        )
        self._decide(state, 1.0, model)


def _check_arguments(args: Arguments, learns: bool) -> None:
    """Refuse ways of training under which scores would be wrong."""
    name = "PruningCallback with learned gates" if learns else "PruningCallback"
    ways = ("DDP",) if learns else ("DDP", "ZeRO-2")
    check_whole_parameters(args, name, ways, CUT_AFTER)
    check_saved_between_steps("PruningCallback")
    check_unscaled(args)
    check_not_compiled(args, "PruningCallback")
    if args.n_gpu > 1:
        raise ValueError(
            f"one process drives {args.n_gpu} GPUs, whose copies of the model cannot share "
            "gates: start one process per GPU with `accelerate launch` or torchrun, or show it "
            "one GPU"
        )


def _shape(value: torch.Tensor | Sequence[int]) -> Sequence[int]:
    return value.shape if isinstance(value, torch.Tensor) else value


def _packed(scores: Mapping[Key, torch.Tensor]) -> dict[str, str]:
    """Return scores as text, bit for bit."""
    return {
        " ".join(key): base64.b64encode(
            values.detach().cpu().numpy().astype("<f8").tobytes()
        ).decode()
        for key, values in scores.items()
    }


def _unpacked(saved: Mapping[str, str]) -> dict[Key, torch.Tensor]:
    scores = {}
    for name, text in saved.items():
        kind, _, path = name.partition(" ")
        values = np.frombuffer(base64.b64decode(text), dtype="<f8").copy()
        scores[kind, path] = torch.from_numpy(values)
    return scores  # type: ignore[return-value]  # kinds that were saved
