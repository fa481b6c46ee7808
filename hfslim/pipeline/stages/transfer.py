"""The stage `transfer`: fine-tune on the labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainerCallback, TrainingArguments

from hfslim.pipeline.manifest import StageRecord
from hfslim.pipeline.stages.base import DDP_ONLY, DDP_OR_ZERO2, LaunchNeed, Stage, check_rank
from hfslim.training.checkpoint import SlimTrainer
from hfslim.training.transfer import L2SP, GradualUnfreezing, train_head_only, with_lora

if TYPE_CHECKING:
    from hfslim.pipeline.run_state import RunState


@dataclass(frozen=True)
class Transfer(Stage):
    """Fine-tune the model on the labels.

    Method `full` trains all weights, `head` the classification head alone, `gradual` the head
    first and then one more layer at a time over the fraction `unfrozen_at` of the steps, and
    `lora` the head and adapters of rank `lora_rank`, which are merged into the weights at the end.
    `l2_sp` is the strength of the L2 penalty on the distance to the pretrained weights.
    """

    name = "transfer"
    arguments = TrainingArguments
    takes_untrained = True
    method: Literal["full", "head", "gradual", "lora"] = "full"
    unfrozen_at: float = 0.5
    lora_rank: int = 8
    l2_sp: float = 0.0
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.unfrozen_at <= 1:
            raise ValueError(f"unfrozen_at {self.unfrozen_at} must be above 0 and up to 1")
        check_rank(self.lora_rank)
        if self.l2_sp < 0:
            raise ValueError(f"l2_sp must be 0 or more, got {self.l2_sp}")
        if self.l2_sp and self.method in ("head", "lora"):
            raise ValueError(
                f"l2_sp pulls back pretrained weights, and method {self.method!r} does not train "
                "them: use 'full' or 'gradual', or leave l2_sp out"
            )

    def launch_needs(self) -> Iterator[LaunchNeed]:
        """Yield what the method and the penalty need."""
        if self.l2_sp:
            yield LaunchNeed("l2_sp", DDP_ONLY)
        if self.method == "gradual":
            yield LaunchNeed("method 'gradual'", DDP_ONLY)
        if self.method == "lora":
            yield LaunchNeed("method 'lora'", DDP_OR_ZERO2)

    def run(self, state: RunState, record: StageRecord, args: Any) -> None:
        """Train, evaluate and save the model."""
        model: Any = state.load(new_head=True)
        callbacks: list[TrainerCallback] = []
        if self.method == "head":
            model = train_head_only(model)
        elif self.method == "lora":
            model = with_lora(model, self.lora_rank)
        elif self.method == "gradual":
            callbacks.append(GradualUnfreezing(self.unfrozen_at))
        if self.l2_sp:
            callbacks.append(L2SP(self.l2_sp))
        trainer = SlimTrainer(model=model, args=args, callbacks=callbacks, **state.trainer_parts())
        state.train_and_save(trainer, record)
