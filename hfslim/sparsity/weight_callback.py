"""Pruning of single weights while training: a callback for any Trainer, also the stock one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from hfslim.anatomy.structure import Structure
from hfslim.anatomy.weights import Names, find_weights, outputs_first, weight_of
from hfslim.pruning.gates.gates import attached_gates
from hfslim.pruning.in_training.gradual import GradualCallback, forget_best
from hfslim.pruning.in_training.schedules import Schedule
from hfslim.pruning.scores.importance import UnusableScoresError
from hfslim.sparsity.held_zeros import HeldZeros
from hfslim.sparsity.weight_masks import SCOPES, Scope, SparsityGoal, remove
from hfslim.training.callback_requirements import CUT_AFTER, check_unscaled, check_whole_parameters
from hfslim.training.log_figures import announce

TrainingMethod = Literal["magnitude", "movement"]
MOVEMENT = "hfslim_movement"
"""Key of the movement scores in the optimizer's first parameter group, in checkpoints."""


class WeightPruningCallback(GradualCallback):
    """Sets single weights to zero while a Trainer trains, and keeps them at zero.

    At each decision the weights of the lowest scores are removed for good: their gradients and
    their optimizer state are zero, and they are set to zero again after each optimizer step. The
    zeros are in the weights themselves: nothing is registered on the model, `state_dict` keys do
    not change, and evaluation, saving and loading need nothing. Zeros that the model has when
    training begins count and are held. Training resumes exactly with the same callback. Without it
    the stock Trainer would lose the zeros; `SlimTrainer` and `DistillationTrainer` raise an error.
    The best model is tracked from the last decision on.

    With `PruningCallback` in one training, put this one after it: fractions and patterns then hold
    for the weights that it keeps. N:M patterns need its decisions done first: give this one a
    `start` no earlier than its `end`.

    (Magnitude, gradually: Zhu and Gupta 2017, arXiv 1710.01878; movement: Sanh et al. 2020,
    arXiv 2005.07683.)

    Args:
        sparsity: Fraction of the weights to remove. With neither it nor `pattern`, the zeros that
            the model has are held.
        pattern: `"2:4"` or another N:M, at most N weights kept of each M consecutive inputs.
        method: The score of a weight: `magnitude`, its absolute value, or `movement`, the sum over
            the steps so far of −weight · gradient.
        scope: Whether weights compete within the whole model (`global`) or within each module
            (`layer`); at the end of a pattern it makes no difference.
        schedule: `cubic`, `linear`, `oneshot` or `iterative`, as for `PruningCallback`.
        start: When pruning begins, as a fraction of the training steps.
        end: When the goal is met, as a fraction of the training steps; the rest is recovery.
        interval: Optimizer steps between decisions; by default the schedule's.
        target_modules: The modules to prune, as for `find_weights`: names, or a regular expression.
        exclude_modules: Modules to exclude.

    Raises:
        ValueError: An argument is out of range; or, when training begins, no module has such a
            name, there are no zeros to hold, the model has more zeros than the goal, the training
            uses FSDP or DeepSpeed, weights cannot be scored, or the checkpoint is of another
            callback.
        UnusableScoresError: A weight or a score is not finite.

    Attributes:
        zeros: The removed weights, bool tensors in the shape of the weights, by path; None before
            training.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str | None = None,
        method: TrainingMethod = "magnitude",
        scope: Scope = "global",
        schedule: Schedule = "cubic",
        start: float = 0.0,
        end: float = 0.5,
        interval: int | None = None,
        target_modules: Names = None,
        exclude_modules: Names = None,
    ) -> None:
        for name, value, valid in (
            ("method", method, get_args(TrainingMethod)),
            ("scope", scope, SCOPES[:2]),
        ):
            if value not in valid:
                raise ValueError(f"{name} must be one of {list(valid)}, got {value!r}")
        super().__init__(
            {
                "sparsity": sparsity,
                "pattern": pattern,
                "method": method,
                "scope": scope,
                "schedule": schedule,
                "start": start,
                "end": end,
                "interval": interval,
                "target_modules": _plain(target_modules),
                "exclude_modules": _plain(exclude_modules),
            }
        )
        holds = sparsity is None and pattern is None
        self.goal = None if holds else SparsityGoal.parse(sparsity, pattern)
        self.zeros: dict[str, torch.Tensor] | None = None
        self._scores_gradients = self.goal is not None and method == "movement"
        self._method, self._scope = method, scope

    def find(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Return the modules of a model whose weights this callback prunes or holds."""
        names = (self._arguments["target_modules"], self._arguments["exclude_modules"])
        return find_weights(model, *names)

    def on_train_begin(  # type: ignore[override]  # the Trainer always passes the model
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Hold the zeros that the model has, and restore the saved state where training resumes."""
        check_whole_parameters(args, type(self).__name__, otherwise=CUT_AFTER)
        if self._scores_gradients:
            check_unscaled(args, ", or use method='magnitude'")
        self._begin(args, state, model)
        self._held = HeldZeros(model, self.find(model))
        self._initial, self._steps_scored = self._held.fraction, 0
        self._movement: dict[str, torch.Tensor] = {}
        if self._scores_gradients:
            _check_trainable(self._held.weights)
            self._movement = {
                path: torch.zeros_like(zeros, dtype=torch.float32)
                for path, zeros in self._held.zeros.items()
            }
        if state.global_step:
            self._restore(state, optimizer)
        self._check_goal(type(model).__name__)
        self._gates = attached_gates(model, "PruningCallback")
        self._structure: Structure | None = None
        self.zeros = self._held.zeros
        self._held.attach()
        self._held.apply(optimizer)
        if self._scores_gradients:
            # torch saves and loads unknown entries of a parameter group unchanged.
            optimizer.param_groups[0][MOVEMENT] = self._movement
        announce(state, f"holds {100 * self._held.fraction:.2f} % of the weights at zero")

    def on_step_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise a ValueError if gates were attached after this callback."""
        if attached_gates(kwargs["model"], "PruningCallback") is not self._gates:
            raise ValueError("put WeightPruningCallback after PruningCallback in `callbacks`")

    def on_pre_optimizer_step(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score by the gradients of all processes, before the weights move."""
        if self._scores_gradients and state.global_step < self._decisions.last:
            self._steps_scored += 1
            for path, score in self._movement.items():
                weight = weight_of(self._held.weights[path])
                if weight.grad is not None:
                    score.addcmul_(weight.detach(), weight.grad, value=-1)

    def on_optimizer_step(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the removed weights to zero again."""
        self._held.apply()

    def on_step_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove more weights when a decision is due, or the structure has changed since."""
        progress = self._decisions.after(state.global_step)
        if progress is None and state.global_step > self._decisions.last:
            progress = 1.0 if self._structure_changed() else None
        if progress is not None:
            self._decide(state, progress, kwargs["optimizer"])

    def figures(self) -> dict[str, float]:
        """Return the fraction of weights removed."""
        return {} if self.zeros is None else {"weight_sparsity": self._held.fraction}

    def on_train_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Meet the goal if training stopped early, and remove the hooks."""
        kwargs["optimizer"].param_groups[0].pop(MOVEMENT, None)
        self._held.detach()
        early = self.goal is not None and self._ended_early(state, lambda: self._decide(state, 1.0))
        if not early and self._structure_changed():
            self._decide(state, 1.0)
        self._take_structure()
        self._held.apply()
        announce(state, f"{100 * self._held.fraction:.2f} % of the weights are zero")

    def _checkpoint(self) -> dict[str, Any] | None:
        if self.zeros is None:
            return None
        own = {"initial": self._initial, "steps_scored": self._steps_scored}
        return own | self._held.state()

    def _has_scores(self, state: TrainerState) -> bool:
        return not self._scores_gradients or self._steps_scored > 0

    def _restore(self, state: TrainerState, optimizer: Any) -> None:
        saved = self._saved(state)
        self._held.restore(saved)
        self._initial, self._steps_scored = saved["initial"], saved["steps_scored"]
        if self._scores_gradients:
            scores = optimizer.param_groups[0].get(MOVEMENT)
            if scores is None:
                raise ValueError(
                    "the checkpoint holds no state of the optimizer, where the movement scores "
                    "are: resume from one saved with save_only_model=False"
                )
            for path, score in self._movement.items():
                score.copy_(scores[path])

    def _check_goal(self, name: str) -> None:
        if self.goal is None and not self._initial:
            raise ValueError(
                "WeightPruningCallback with neither sparsity nor pattern holds the zeros that the "
                f"model has, and this {name} has none: give one of them"
            )
        if self.goal is not None and self._initial > self.goal.sparsity:
            raise ValueError(
                f"{self._initial:.2%} of the weights are zero already, more than the "
                f"{self.goal.sparsity:.2%} asked for"
            )

    def _decide(self, state: TrainerState, progress: float, optimizer: Any = None) -> None:
        self._take_structure()
        if self.goal is None:
            return
        held = self._held
        before = {path: held.part(path, zeros) for path, zeros in held.zeros.items()}
        scores = {path: held.part(path, score) for path, score in self._scores().items()}
        transposed = self._outputs_first(scores), self._outputs_first(before)
        after = self._outputs_first(
            remove(*transposed, self.goal, self._scope, progress, self._initial)
        )
        changed = any(not torch.equal(after[path], zeros) for path, zeros in before.items())
        held.add(after)
        if changed:
            held.apply(optimizer)
            forget_best(state)
            removed = f"{100 * held.fraction:.2f} % of the weights removed"
            announce(state, f"step {state.global_step}: {removed}")

    def _outputs_first(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {path: outputs_first(self._held.weights[path], t) for path, t in tensors.items()}

    def _scores(self) -> dict[str, torch.Tensor]:
        scores = self._movement or {
            path: weight_of(module).detach().abs() for path, module in self._held.weights.items()
        }
        for path, score in scores.items():
            if not torch.isfinite(score).all():
                raise UnusableScoresError(
                    f"the {self._method} scores of {path!r} are not finite: training has diverged"
                )
        return scores

    def _structure_changed(self) -> bool:
        return self._gates is not None and self._gates.structure != self._structure

    def _take_structure(self) -> None:
        """Record the part of each weight that the gates of a PruningCallback keep."""
        if self._gates is None or self._gates.structure is None:
            return
        self._structure = self._gates.structure
        indices: dict[str, dict[int, torch.Tensor]] = {}
        for site in self._gates.units:
            kept = self._structure.kept(site.kind, site.path)
            removed = set(range(site.size)) - set(kept)
            for cut in site.cuts if removed else ():
                if cut.tensor == "weight" and cut.module in self._held.zeros:
                    length = self._held.zeros[cut.module].shape[cut.dim]
                    index = cut.indices(kept, site.size, length)
                    indices.setdefault(cut.module, {})[cut.dim] = index
            if site.kind == "layers":
                gone = tuple(f"{part}." for index in removed for part in site.parts(index))
                for path in self._held.weights:
                    if path.startswith(gone):
                        indices[path] = {0: torch.empty(0, dtype=torch.long)}
        self._held.kept = indices


def _check_trainable(weights: Mapping[str, nn.Module]) -> None:
    frozen = [path for path, module in weights.items() if not weight_of(module).requires_grad]
    if frozen:
        raise ValueError(
            f"movement scores come from training, and {len(frozen)} weights are frozen, such as "
            f"{frozen[0]!r}: leave them out with exclude_modules, or use method='magnitude'"
        )


def _plain(names: Names) -> Any:
    return names if names is None or isinstance(names, str) else list(names)
