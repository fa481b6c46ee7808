"""The feature losses of a distillation: what they need of both models, and their sum's parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging

from hfslim.adapters import base_of
from hfslim.anatomy.inputs import example_inputs
from hfslim.distill import features
from hfslim.distill.capture import Capture, Seen, position_mask
from hfslim.distill.layers import Pairs, dynamic_pairs, static_pairs
from hfslim.distill.packing import Packing
from hfslim.prune.gates import closed_layers
from hfslim.shares import share_of
from hfslim.timing import evaluating

__all__ = ["FEATURE_LOSSES", "FeatureTerms"]

logger = logging.get_logger(__name__)

_STATE = "distillation.safetensors"
_PROBE_LENGTH = {"input_ids": 16, "input_values": 4000, "input_features": 64}


@dataclass(frozen=True)
class FeatureLoss:
    """What a feature loss compares.

    Attributes:
        on: `hidden` states or `attentions` of the paired layers, or the last attention's `vectors`
            (queries, keys, values).
        function: Of `hfslim.distill.features`; for `vectors`, the positions of those compared.
        last_attention: Whether the last layer's attention probabilities are compared as well.
    """

    on: Literal["hidden", "attentions", "vectors"]
    function: Callable[..., Tensor]
    vectors: tuple[int, ...] = ()
    last_attention: bool = False

    @property
    def needs_attentions(self) -> bool:
        """Whether attention probabilities are compared."""
        return self.on == "attentions" or self.last_attention


FEATURE_LOSSES: dict[str, FeatureLoss] = {
    "hidden_mse": FeatureLoss("hidden", features.hidden_mse),
    "hidden_cosine": FeatureLoss("hidden", features.hidden_cosine),
    "hidden_l1_cosine": FeatureLoss("hidden", features.hidden_l1_cosine),
    "attention": FeatureLoss("attentions", features.attention_mse),
    "minilm": FeatureLoss("vectors", features.relation_kl, vectors=(2,), last_attention=True),
    "minilm_v2": FeatureLoss("vectors", features.relation_kl, vectors=(0, 1, 2)),
}
"""The losses on features by their names in `DistillationConfig.feature_losses`."""


class FeatureTerms:
    """Runs the feature losses of one training: capture, layer map, projections.

    Both models run once on a small random input, so that what cannot be compared is refused before
    training.

    Args:
        student: The student, not wrapped.
        teacher: The teacher.
        names: The losses, of `FEATURE_LOSSES`.
        layer_map: A name of `layers.LAYER_MAPS`, or pairs of layers.
        projection: Whether hidden states of other widths are projected to the teacher's.
        relation_heads: Number of relation heads; by default the largest that fits both models and
            is at most the teacher's number of heads.

    Attributes:
        packing: What of the teacher's inside the losses need.
        projections: Linear maps by `{student width}-{teacher width}`; trained with the student,
            part of training checkpoints, and of no exported model.

    Raises:
        ValueError: The two models cannot be compared in this way; the message names the fix.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        names: Sequence[str],
        layer_map: str | Pairs,
        projection: bool,
        relation_heads: int | None,
    ) -> None:
        self.names = names
        used = [FEATURE_LOSSES[name] for name in names]
        needs = {
            "hidden": any(loss.on == "hidden" for loss in used),
            "attentions": any(loss.needs_attentions for loss in used),
            "vectors": any(loss.on == "vectors" for loss in used),
        }
        self.student, self.teacher = base_of(student), base_of(teacher)
        self.captures = Capture(student, **needs), Capture(teacher, **needs)
        self.layer_map = layer_map
        self._probe = self._run_probe()
        self.teacher_layers = self._chosen_teacher_layers()
        self._pairs: Pairs | None = None
        self.packing = Packing(self._kept_layers(), self._probe[1])
        self._costs = np.zeros(1)
        self.relation_heads = self._fitting_heads(relation_heads) if needs["vectors"] else 0
        self.projections = self._make_projections(projection)
        if needs["hidden"] or any(loss.on == "attentions" for loss in used):
            logger.info(f"layers of student and teacher that are paired: {self.pairs()}")

    def pairs(self) -> Pairs:
        """Return the layers to compare in this step, of the student's those that are not closed."""
        sizes = [len(seen.hidden or seen.attentions) for seen in self._probe]
        if not isinstance(self.layer_map, str):
            return self.layer_map
        alive = self._alive(sizes[0])
        if self.layer_map != "dynamic":
            return [(alive[s], t) for s, t in static_pairs(self.layer_map, len(alive), sizes[1])]
        if self._pairs is not None and {s for s, _ in self._pairs} <= set(alive):
            return self._pairs
        chosen = self.teacher_layers
        first = static_pairs("uniform", len(alive), len(chosen))
        return [(alive[s], chosen[t]) for s, t in first]

    def losses(self, seen: Seen, taught: Seen, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Compute each loss.

        Args:
            seen: What the student computed.
            taught: What the teacher computed on the same batch.
            inputs: The student's batch.

        Returns:
            `[batch]` by name; losses on layers are means over the pairs.
        """
        result: dict[str, Tensor] = {}
        pairs = self.pairs() if taught.hidden or taught.attentions else []
        first = next(iter([*seen.hidden, *seen.vectors]), None)
        positions = seen.attentions[0].shape[-1] if first is None else first.shape[1]
        mask = position_mask(self.student, inputs, positions)
        projected = {
            (s, t): self._project(seen.hidden[s], taught.hidden[t]) for s, t in pairs if seen.hidden
        }
        for name in self.names:
            loss = FEATURE_LOSSES[name]
            if loss.on == "hidden":
                parts = [loss.function(projected[s, t], taught.hidden[t], mask) for s, t in pairs]
            elif loss.on == "attentions":
                parts = [
                    loss.function(seen.attentions[s], taught.attentions[t], mask) for s, t in pairs
                ]
            else:
                parts = [
                    loss.function(seen.vectors[i], taught.vectors[i], self.relation_heads, mask)
                    for i in loss.vectors
                ]
                if loss.last_attention:
                    last = seen.attentions[-1], taught.attentions[-1]
                    parts.append(features.attention_kl(*last, mask))
            result[name] = torch.stack(parts).mean(0)
        if self.layer_map == "dynamic" and seen.hidden:
            self._add_costs(seen, taught, mask)
        return result

    def pairs_are_kept(self) -> bool:
        """Tell whether the layers to compare in this step are among those of `packing`."""
        return not self.packing.layers or {t for _, t in self.pairs()} <= set(self.packing.layers)

    def mask(self, positions: int, inputs: dict[str, Any]) -> Tensor:
        """Tell which positions count, `[batch or 1, positions]` bool."""
        mask = position_mask(self.student, inputs, positions)
        if mask is not None:
            return mask.bool()
        return torch.ones(1, positions, dtype=torch.bool, device=self.student.device)

    def end_step(self, accelerator: Accelerator) -> None:
        """Average the projections' gradients over processes, and choose the next dynamic map."""
        for parameter in self.projections.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(accelerator.reduce(parameter.grad, reduction="mean"))
        if self._costs.ndim == 2:
            costs = torch.from_numpy(self._costs).float().to(accelerator.device)
            total = accelerator.reduce(costs, reduction="sum").cpu().double().numpy()
            closed = set(range(total.shape[1])) - set(self._alive(total.shape[1]))
            total[:, sorted(closed)] = np.inf
            before = self._pairs
            self._pairs = [(s, self.teacher_layers[t]) for s, t in dynamic_pairs(total)]
            if self._pairs != before:
                logger.info(f"layers of student and teacher that are paired: {self._pairs}")
            self._costs = np.zeros(1)

    def save(self, folder: str | Path) -> None:
        """Write what training changes beside a checkpoint's weights."""
        state = {name: value.contiguous() for name, value in self.projections.state_dict().items()}
        if self._pairs is not None:
            state["pairs"] = torch.tensor(self._pairs)
        if state:
            save_file(state, Path(folder) / _STATE)

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: The checkpoint was written under other settings.
        """
        path = Path(folder) / _STATE
        state = load_file(path) if path.exists() else {}
        pairs = state.pop("pairs", None)
        self._pairs = None if pairs is None else [(int(s), int(t)) for s, t in pairs]
        expected = self.projections.state_dict()
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in expected.items()}:
            raise ValueError(
                f"{path} holds the projections {sorted(state)}, this training has "
                f"{sorted(expected)}: resume with the feature losses, layer map and models that "
                "the checkpoint was written with."
            )
        self.projections.load_state_dict(state)

    def _run_probe(self) -> tuple[Seen, Seen]:
        length = _PROBE_LENGTH.get(self.student.main_input_name)
        result = []
        for capture in self.captures:
            model = capture.model
            inputs = example_inputs(model, batch_size=2, length=length)
            with capture.recording() as seen, evaluating(model):
                model(**inputs, **capture.arguments)
            result.append(seen)
        mine, theirs = result
        for one, other, what in (
            (mine.hidden, theirs.hidden, "hidden states"),
            (mine.vectors, theirs.vectors, "queries, keys and values"),
        ):
            shapes = [{tuple(x.shape[:2]) for x in group} for group in (one, other)]
            if shapes[0] != shapes[1] or len(shapes[0]) > 1:
                raise ValueError(
                    f"The {what} of student and teacher have {shapes[0]} and {shapes[1]} examples "
                    "and positions for the same 2 examples, so they cannot be compared one by one; "
                    "use losses on logits."
                )
        return mine, theirs

    def _chosen_teacher_layers(self) -> list[int]:
        number = len(self._probe[1].hidden)
        if self.layer_map != "dynamic" or not number:
            return []
        few = max(1, round(number / 3))
        return [t for _, t in static_pairs("uniform", few, number)]

    def _kept_layers(self) -> list[int]:
        if not self._probe[1].hidden:
            return []
        return self.teacher_layers or sorted({t for _, t in self.pairs()})

    def _alive(self, number: int) -> list[int]:
        closed = closed_layers(self.student)
        layers = self.captures[0].layers
        alive = [i for i in range(number) if i >= len(layers) or layers[i] not in closed]
        return alive or [number - 1]

    def _fitting_heads(self, asked: int | None) -> int:
        widths = [x.shape[-1] for seen in self._probe for x in seen.vectors]
        common = math.gcd(*widths)
        if asked is not None:
            if common % asked:
                raise ValueError(
                    f"relation_heads={asked} does not divide the widths {sorted(set(widths))} of "
                    f"queries, keys and values; choose a divisor of {common}."
                )
            return asked
        most = self.captures[1].heads
        heads = next(n for n in range(min(most, common), 0, -1) if common % n == 0)
        logger.info(f"minilm: {heads} relation heads")
        return heads

    def _make_projections(self, allowed: bool) -> nn.ModuleDict:
        hidden = [[x.shape[-1] for x in seen.hidden] for seen in self._probe]
        if not any(FEATURE_LOSSES[name].on == "hidden" for name in self.names):
            return nn.ModuleDict()
        pairs = self.pairs()
        if self.layer_map == "dynamic":
            pairs = [(s, t) for s in range(len(hidden[0])) for t in self.teacher_layers]
        for s, t in pairs:
            if s >= len(hidden[0]) or t >= len(hidden[1]):
                raise ValueError(
                    f"layer_map pairs layer {s} of the student with {t} of the teacher; they have "
                    f"{len(hidden[0])} and {len(hidden[1])}, counted from 0."
                )
        widths = {(hidden[0][s], hidden[1][t]) for s, t in pairs}
        unequal = sorted((s, t) for s, t in widths if s != t)
        if unequal and not allowed:
            raise ValueError(
                f"The hidden states are {unequal[0][0]} wide in the student and {unequal[0][1]} in "
                "the teacher; set hidden_projection=True to train a linear map between them, or "
                "use minilm_v2, which compares models of any width."
            )
        device = next(self.student.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            maps = nn.ModuleDict({f"{s}-{t}": nn.Linear(s, t, bias=False) for s, t in unequal})
        return maps.to(device)

    def _project(self, student: Tensor, teacher: Tensor) -> Tensor:
        widths = student.shape[-1], teacher.shape[-1]
        if widths[0] == widths[1]:
            return student
        return self.projections[f"{widths[0]}-{widths[1]}"](student.float())

    @torch.no_grad()
    def _add_costs(self, seen: Seen, taught: Seen, mask: Tensor | None) -> None:
        costs = np.array(
            [
                [
                    features.hidden_mse(self._project(s, taught.hidden[t]), taught.hidden[t], mask)
                    .double()
                    .sum()
                    .item()
                    for s in seen.hidden
                ]
                for t in self.teacher_layers
            ]
        )
        share = share_of(self.student)
        self._costs = self._costs + costs * (share is None or share.counts)
