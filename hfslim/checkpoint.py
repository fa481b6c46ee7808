"""Trainer checkpoints that restore exactly the weights that were saved.

`save_pretrained` writes the key names (and, for fused weights, the layout) of the Hub's files,
which for many families differ from those of the live model. The stock Trainer saves its checkpoints
that way, yet reads them back with a plain `load_state_dict(strict=False)`: what does not match is
dropped with a warning, so a resumed run goes on from other weights and `load_best_model_at_end`
keeps the last ones. Here a checkpoint keeps the live model's keys and a mismatch is an error. The
final `trainer.save_model()` stays in the Hub's format; `from_pretrained` reads both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel, Trainer

from hfslim.hub.trainer import HubMixin
from hfslim.objective import MeanLossMixin

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

__all__ = ["CheckpointMixin", "SlimTrainer"]

_LOST = {
    "PruningCallback": "the units removed so far would come back",
    "WeightPruningCallback": "the weights removed so far would come back",
}
"""Callbacks without which a checkpoint cannot be resumed, and what would happen."""


@contextmanager
def _live_keys(model: nn.Module) -> Iterator[None]:
    """Let `model.save_pretrained` write the live model's keys inside the block."""
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


class CheckpointMixin(_Base):
    """Makes resume and `load_best_model_at_end` of a Trainer exact.

    Put it before the Trainer class: `class MyTrainer(CheckpointMixin, Trainer)`. Applies to the
    `checkpoint-*` folders only. Pruned models need nothing more: their layers already have the
    saved shapes when the weights are read.

    Raises:
        ValueError: When a checkpoint is loaded whose keys are not those of the model, or that was
            saved while a callback pruned that this Trainer does not have.
    """

    def _load_callback_state(self) -> None:
        present = {type(callback).__name__ for callback in self.callback_handler.callbacks or ()}
        for name, consequence in _LOST.items():
            if name in (self.state.stateful_callbacks or ()) and name not in present:
                raise ValueError(
                    f"The checkpoint was saved in the middle of pruning, by a {name} that this "
                    f"Trainer does not have, so {consequence}; pass the same callback. To go on "
                    "with the whole model, start a new run from the folder by from_pretrained."
                )
        super()._load_callback_state()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with _live_keys(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)):
            super()._save_checkpoint(model, trial)

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
    """Missing keys that neither share their tensor with a loaded key nor are left out on saving."""
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


class SlimTrainer(CheckpointMixin, HubMixin, MeanLossMixin, Trainer):
    """The stock Trainer with exact checkpoints and a loss that no batch layout changes.

    What it pushes to the Hub is complete in every commit, with hfslim's card.

    Takes the arguments of `transformers.Trainer`, except `compute_loss_func`.
    """
