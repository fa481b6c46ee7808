"""Trainer checkpoints that restore exactly the weights that were saved.

`save_pretrained` writes the key names (and, for fused weights, the layout) of the Hub's files,
which for many families differ from those of the live model. The stock Trainer saves its checkpoints
that way, yet reads them back with a plain `load_state_dict(strict=False)`, which drops unknown keys
with a warning: a resumed run starts from other weights and `load_best_model_at_end` keeps the last
ones. Here a checkpoint has the live model's keys and a mismatch is an error. The final
`trainer.save_model()` stays in the Hub's format; `from_pretrained` reads both.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hfslim.training.checkpoint_folders import (
    STAGING,
    CheckpointError,
    checkpoint_errors,
    last_whole,
    problem_of,
    rotate,
    save_whole,
)
from hfslim.training.hub_pushes import HubMixin
from hfslim.training.log_figures import FiguresMixin
from hfslim.training.objective import MeanLossMixin
from hfslim.training.parallel import check_fsdp, freeze_empty, save_where_asked, shard_by_anatomy
from hfslim.training.preemption import SaveOnSigterm
from hfslim.training.ranks import from_all_ranks, from_first_rank

__all__ = ["CheckpointError", "CheckpointMixin", "SlimTrainer"]

logger = logging.get_logger(__name__)

_LOST = {
    "PruningCallback": ("structure", "the units removed so far would come back"),
    "WeightPruningCallback": ("digest", "the weights removed so far would come back"),
}
"""Callbacks without which a checkpoint cannot be resumed: the field of their state that identifies
the removed units or weights, and the consequence."""


@contextmanager
def _live_keys(model: nn.Module) -> Iterator[None]:
    """Make `model.save_pretrained` write the live model's keys inside the block."""
    if not isinstance(model, PreTrainedModel):
        yield
        return
    own = vars(model)
    before = own.get("save_pretrained")
    own["save_pretrained"] = partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        if before is None:
            del own["save_pretrained"]
        else:
            own["save_pretrained"] = before


class CheckpointMixin(Trainer):
    """Makes resume and `load_best_model_at_end` of a Trainer exact, and its checkpoints whole.

    Put it before the Trainer class: `class MyTrainer(CheckpointMixin, Trainer)`. Applies to the
    `checkpoint-*` folders only.

    A checkpoint is written into `.saving` and renamed when all of it is on the disk; it is renamed
    out of place before it is deleted. `train(resume_from_checkpoint=True)` takes the last whole
    one. With `enable_jit_checkpoint=True` SIGTERM ends the training after the current step, the
    same on all processes, with a checkpoint and exit code 143.

    Raises:
        CheckpointError: A checkpoint cannot be written (earlier ones stay as they are), or the one
            to resume from is not whole.
        ValueError: A checkpoint that is loaded has other keys than the model, or the state of a
            pruning callback that this Trainer does not have.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_fsdp(self.args)
        if self.args.save_on_each_node:
            save_where_asked(self.model)
        self._staging: Path | None = None
        self._sigterm = SaveOnSigterm(self.accelerator)
        stock = self.callback_handler.pop_callback(JITCheckpointCallback)
        if stock is not None:
            # It saves in the middle of steps, each process on its own.
            stock.on_train_end(self.args, self.state, self.control)
            # First, so that the other callbacks see that a checkpoint is due.
            self.callback_handler.callbacks.insert(0, self._sigterm)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, which shards by anatomy under FSDP2."""
        super().create_accelerator_and_postprocess()
        shard_by_anatomy(self.accelerator)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer, without parameters that FSDP cannot train."""
        if self.is_fsdp_enabled:
            freeze_empty(self.model)
        return super().create_optimizer(*args, **kwargs)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as `transformers.Trainer.train`; True resumes from the last whole checkpoint."""
        if resume_from_checkpoint:
            resume_from_checkpoint = self._whole(resume_from_checkpoint)
        if self.args.should_save:
            shutil.rmtree(Path(str(self.args.output_dir)) / STAGING, ignore_errors=True)
        try:
            outcome = super().train(resume_from_checkpoint, *args, **kwargs)
            self._sigterm.leave()
            return outcome
        finally:
            self._sigterm.stop()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            # The stock Trainer takes one more step when it resumes a complete run.
            self.control.should_training_stop = True

    def _whole(self, given: str | bool) -> str:
        """Return the checkpoint to resume from, the same on all processes."""
        run = Path(str(self.args.output_dir))
        last, broken = last_whole(run)
        if given is True:
            for one in broken:
                logger.warning(f"passing over a checkpoint that is not whole: {one}")
            # A machine with a file system of its own may have been stopped before it had saved.
            names = from_all_ranks(last.name if last else "")
            if not all(names):
                raise ValueError(
                    f"there is no whole checkpoint in {run} to resume from: leave out "
                    "resume_from_checkpoint to begin"
                )
            path = str(run / min(names, key=lambda name: int(name.rpartition("-")[2])))
        else:
            path = from_first_rank(lambda: str(given))
        problem = problem_of(Path(path))
        if problem is not None:
            also = f"; the last whole one is {last}" if last else ""
            raise CheckpointError(f"the checkpoint {path} is not whole: {problem}{also}")
        logger.info(f"resuming from {path}")
        return path

    def _load_callback_state(self) -> None:
        present = {type(callback).__name__ for callback in self.callback_handler.callbacks or ()}
        for name, (_, consequence) in _LOST.items():
            if name in (self.state.stateful_callbacks or ()) and name not in present:
                raise ValueError(
                    f"The checkpoint was saved in the middle of pruning, by a {name} that this "
                    f"Trainer does not have, so {consequence}; pass the same callback. To go on "
                    "with the whole model, start a new run from the folder by from_pretrained."
                )
        super()._load_callback_state()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with checkpoint_errors(name, run):
            if self.args.should_save:
                shutil.rmtree(run / STAGING, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._staging = run / STAGING
            try:
                with _live_keys(
                    self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
                ):
                    super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self._publish(run, name)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    def _publish(self, run: Path, name: str) -> None:
        """Move a checkpoint that all processes have written into place, and delete old ones."""
        staged, state = run / STAGING / name, self.state
        best = f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if best == name or (run / best).is_dir():
            state.best_model_checkpoint = str(run / best)
        if self.args.should_save:
            state.save_to_json(str(staged / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        # Machines without a common file system each hold a part of it. None deletes an older
        # checkpoint before all hold this one.
        moved = False
        for turn in (self.is_world_process_zero(), self.is_local_process_zero()):
            if turn and staged.is_dir():
                save_whole(staged, run / name)
                for beside in (path for path in staged.parent.iterdir() if path.is_file()):
                    beside.replace(run / beside.name)
                moved = True
            self.accelerator.wait_for_everyone()
        if moved:
            rotate(run / name, self.args.save_total_limit, state.best_model_checkpoint)
            staged.parent.rmdir()
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        written = best / TRAINER_STATE_NAME
        saved: Any = {}
        if written.is_file():
            saved = TrainerState.load_from_json(str(written)).stateful_callbacks or {}
        for callback in self.callback_handler.callbacks:
            name: Any = type(callback).__name__
            if name in _LOST and name in saved:
                field, _ = _LOST[name]
                then, now = (
                    state["attributes"]["saved"][field] for state in (saved[name], callback.state())
                )
                if then != now:
                    logger.warning(
                        f"the best model, {best}, has another structure than the last one "
                        f"({name} has removed more since): the last weights are kept"
                    )
                    return
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        missing = _really_missing(self.model, load_result.missing_keys)
        unexpected = list(load_result.unexpected_keys)
        if missing or unexpected:
            raise ValueError(
                "The checkpoint does not hold the weights of this model: "
                f"{len(missing)} missing ({', '.join(missing[:3]) or 'none'}), "
                f"{len(unexpected)} unexpected ({', '.join(unexpected[:3]) or 'none'}). "
                "Checkpoints written by the stock Trainer use the Hub's key names: load such a "
                "folder with from_pretrained and start a new run from it."
            )
        if load_result.missing_keys and isinstance(self.model, PreTrainedModel):
            self.model.tie_weights()


def _really_missing(model: Any, missing: list[str]) -> list[str]:
    """Return missing keys that share no tensor with a loaded key and are not left out on saving."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    absent = set(missing)
    loaded = {id(tensor) for name, tensor in tensors.items() if name not in absent}
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return [
        name
        for name in missing
        if not (name in tensors and id(tensors[name]) in loaded)
        and not any(re.search(pattern, name) for pattern in ignored)
    ]


class SlimTrainer(CheckpointMixin, HubMixin, FiguresMixin, MeanLossMixin):
    """The stock Trainer with exact checkpoints and a loss that no batch layout changes.

    Every commit that it pushes to the Hub is complete, with hfslim's card. Takes the arguments of
    `transformers.Trainer`, except `compute_loss_func`.
    """
