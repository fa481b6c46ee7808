"""What every method is given, and the checks that all of them share."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.structure import Kind
from hfslim.anatomy.units import Units
from hfslim.measuring.measurement import macs
from hfslim.measuring.timing import evaluating

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """What there is to cut a model with.

    Attributes:
        teacher: The trained model; methods cut copies of it.
        calibration: Labelled training examples, in batches.
        inputs: The input at which multiply-accumulates are counted.
        seed: Seed of whatever is drawn.
    """

    teacher: PreTrainedModel
    calibration: Sequence[Batch]
    inputs: Batch
    seed: int

    def copy(self) -> PreTrainedModel:
        return copy.deepcopy(self.teacher)

    @cached_property
    def whole(self) -> int:
        return macs(self.teacher, self.inputs)

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """What there is to cut: heads and neurons, or in a convolutional net channels."""
        found = {site.kind for site in find_units(self.teacher)}
        return ("heads", "neurons") if "heads" in found else ("channels",)

    @property
    def units(self) -> Units:
        return find_units(self.teacher).of(self.kinds)

    def kept(self, model: PreTrainedModel) -> float:
        """Fraction of the teacher's multiply-accumulates that a model has."""
        return macs(model, self.inputs) / self.whole


Cut = Callable[[Problem, float], PreTrainedModel]
"""Makes a model that keeps a fraction of the teacher's multiply-accumulates."""


@dataclass(frozen=True)
class Score:
    """Accuracy and mean loss on labelled examples."""

    accuracy: float
    loss: float


def score(model: PreTrainedModel, batches: Sequence[Batch]) -> Score:
    right, loss, count = 0, 0.0, 0
    with evaluating(model):
        for batch in batches:
            output = model(**batch)
            right += int((output.logits.argmax(-1) == batch["labels"]).sum())
            loss += float(output.loss) * len(batch["labels"])
            count += len(batch["labels"])
    return Score(right / count, loss / count)
