"""Pruning of units while training: a callback for any Trainer, also the stock one."""

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

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import Stated
from hfslim.anatomy.structure import Key, Kind, Structure
from hfslim.pruning.gates.gates import Gates
from hfslim.pruning.in_training.expected_cost import ExpectedCost
from hfslim.pruning.in_training.gradual import GradualCallback, forget_best
from hfslim.pruning.in_training.learned_gates import WARM_UP, LearnedGates
from hfslim.pruning.in_training.schedules import Schedule
from hfslim.pruning.scores.collector import Collector
from hfslim.pruning.scores.criteria import Criteria, criteria_by_kind, learns
from hfslim.pruning.scores.importance import Scores
from hfslim.pruning.search.search import Search
from hfslim.pruning.steps import agreed, check_prunable, check_reachable
from hfslim.pruning.surgery.proof import check_gates
from hfslim.pruning.surgery.surgery import shrink
from hfslim.pruning.target import Target
from hfslim.training.callback_requirements import (
    CUT_AFTER,
    check_not_compiled,
    check_unscaled,
    check_whole_parameters,
)
from hfslim.training.log_figures import announce
from hfslim.training.ranks import rank

logger = logging.getLogger(__name__)


class PruningCallback(GradualCallback):
    """Prunes gradually while a Trainer trains, then shrinks the model.

    Units are scored by the gradients of the training itself, summed over the examples of all
    processes. At each decision more gates close; none opens again. Shapes change only when training
    has ended: `trainer.model` is then the small model, `trainer.save_model()` saves it, and further
    training needs a new Trainer. Checkpoints hold the whole model with its gates, and training
    resumes exactly with the same callback. Without it the stock Trainer would restore the removed
    units; `SlimTrainer` and `DistillationTrainer` raise an error. The best model is tracked from
    the last decision on. After an error in training the gates stay in the model until the next
    training with a PruningCallback begins.

    Args:
        target: The target, as for `prune`.
        units: Kinds of units that may be removed.
        criterion: How units are scored, as for `prune`; or `l0`: gates are learned beside the
            weights, by hard-concrete noise and a Lagrangian whose target decreases along the
            schedule; at the end the units whose gates are most likely open are kept, as many as the
            target allows.
        schedule: `cubic` (most of it early) or `linear`, in twenty decisions; `iterative`, in four
            decisions, a quarter of the time from start to end apart; or `oneshot`.
        start: When pruning begins, as a fraction of the training steps.
        end: When the target is met, as a fraction of the training steps; the rest is recovery.
        interval: Optimizer steps between decisions; by default the schedule's.
        inputs: The input at which multiply-accumulates are counted, as for `prune`.
        seed: Seed of random scores.

    Raises:
        ValueError: An argument is out of range; or, when training begins, it uses fp16, FSDP,
            ZeRO-3, torch.compile or several GPUs in one process, or the checkpoint is of another
            callback.
        UnreachableTargetError: When training begins, the target cannot be reached.
        RuntimeError: When training begins, the model does not run some units as modules, or runs
            them more than once.

    Attributes:
        structure: The units that are kept, by their indices before any cut; None before training.
        scores: The scores of the last decision, `[units]` by kind and site; None before the first.
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
        self.goal = Target.parse(target, units)
        self.criteria = criteria_by_kind(criterion, units, "training")
        super().__init__(
            {
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
        )
        self._learns = learns(self.criteria)
        if self._learns:
            self._pace.check_learned()
        self.structure: Structure | None = None
        self.scores: Mapping[Key, torch.Tensor] | None = None
        self._inputs, self._seed = inputs, seed
        self._learned: LearnedGates | None = None
        self._collector: Collector = None  # type: ignore[assignment]  # made when training begins

    def on_train_begin(  # type: ignore[override]  # the Trainer always passes the model
        self, args: Arguments, state: TrainerState, *_: Any, model: PreTrainedModel, **__: Any
    ) -> None:
        """Gate the model, and restore the saved state where training resumes."""
        name = "PruningCallback with learned gates" if self._learns else "PruningCallback"
        ways = ("DDP",) if self._learns else ("DDP", "ZeRO-2")
        check_whole_parameters(args, name, ways, CUT_AFTER)
        _check_arguments(args)
        check_prunable(model)
        self._begin(args, state, model)
        kinds = self._arguments["units"]
        units = find_units(model, "dimensions" in kinds).of(kinds)
        self._search = Search.priced(model, units, self.goal, self._inputs)
        if self._search.price.resource != self.goal.resource:
            coupled = " and ".join(sorted({site.kind for site in units if site.coupled}))
            raise ValueError(
                f"there is no latency table for {coupled} to use while a model trains: give "
                'target={"macs": …}, or cut in one go by hfslim.prune, which times what it cuts'
            )
        check_reachable(self._search)
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
        wanted = ", ".join(f"{key}={value}" for key, value in self._arguments["target"].items())
        announce(
            state,
            f"PruningCallback: prunes {' and '.join(kinds)} to {wanted} from step "
            f"{self._decisions.first + 1} to step {self._decisions.last} of {state.max_steps}, now "
            f"{self.structure}",
        )

    def on_step_begin(self, args: Arguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Score units, or draw gates, until the last decision."""
        if not self._decisions.first <= state.global_step < self._decisions.last:
            return
        if self._learned is not None:
            self._learned.draw(state.global_step)
            return
        if self._decided:
            self._collector.reset(keep_accumulated=True)
            self._decided = False
        self._collector.start()

    def on_pre_optimizer_step(
        self, args: Arguments, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        """Update the learned gates by the gradients of the step."""
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
            self._learned.use_means()
        elif progress is not None:
            self._decide(state, progress, kwargs["model"])
        self._before_save(control)

    def on_epoch_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Gather the scores of all ranks if a checkpoint follows."""
        self._before_save(control)

    def figures(self) -> dict[str, float]:
        """Return the fractions of units that are kept, or expected to be."""
        if self._learned is not None:
            return {f"expected_{name}": part for name, part in self._learned.expected().items()}
        counts = {} if self.structure is None else self.structure.counts()
        return {f"kept_{kind}": here / total for kind, (here, total) in counts.items()}

    def on_train_end(  # type: ignore[override]
        self, args: Arguments, state: TrainerState, *_: Any, model: PreTrainedModel, **__: Any
    ) -> None:
        """Shrink the model."""
        self._ended_early(state, lambda: self._decide(state, 1.0, model))
        self._collector.gates.detach()
        assert self.structure is not None
        shrink(model, self.structure)
        model.add_model_tags(["hfslim", "pruned"])
        announce(state, f"PruningCallback: the model is shrunk, it keeps {self.structure}")

    def _checkpoint(self) -> dict[str, Any] | None:
        if self.structure is None:
            return None
        return {
            "structure": self.structure.to_dict(),
            "decided": self._decided,
            "count": self._collector.scores.count,
            "sums": _packed(self._collector.scores.sums),
            "scores": self.scores and _packed(self.scores),
            "learned": self._learned and self._learned.state(),
        }

    def _has_scores(self, state: TrainerState) -> bool:
        if self._learned is not None:
            return state.global_step > self._decisions.first
        return not self._collector.needs_data or bool(self._collector.scores.reduce().count)

    def _restore(self, state: TrainerState) -> None:
        saved = self._saved(state)
        self.structure = Structure.from_dict(saved["structure"])
        self._decided = saved["decided"]
        self.scores = saved["scores"] and _unpacked(saved["scores"])
        if self._learned is not None:
            self._learned.restore(saved["learned"])
            self._learned.use_means()
        if rank() == 0:
            self._collector.scores = Scores(_unpacked(saved["sums"]), saved["count"])

    def _before_save(self, control: TrainerControl) -> None:
        """Move the scores of all ranks to rank 0, which writes the checkpoint; the sum stays."""
        if control.should_save or control.should_evaluate:
            total = self._collector.scores.reduce()
            self._collector.reset()
            if rank() == 0:
                self._collector.scores = total

    def _decide(self, state: TrainerState, progress: float, model: PreTrainedModel) -> None:
        gates = self._collector.gates
        if self._learned is not None:
            scores = self._learned.scores()
            logger.info("step %d: expected to keep %s", state.global_step, self._learned.expected())
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
            forget_best(state)
            announce(state, f"step {state.global_step}: keeps {new} ({new.digest()})")


def _check_arguments(args: Arguments) -> None:
    """Raise a ValueError on trainings whose scores would be wrong."""
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
    return scores  # type: ignore[return-value]  # the kinds are valid
