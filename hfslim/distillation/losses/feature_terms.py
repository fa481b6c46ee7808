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

from hfslim.anatomy.adapters import base_of
from hfslim.anatomy.layer_modules import layer_modules
from hfslim.distillation.losses import feature_losses
from hfslim.distillation.losses.capture import Capture, Seen, position_mask
from hfslim.distillation.losses.comparable import check_layers, probed
from hfslim.distillation.losses.layer_maps import Pairs, dynamic_pairs, static_pairs
from hfslim.distillation.losses.packing import Packing
from hfslim.pruning.gates.gates import closed_layers
from hfslim.training.batch_shares import share_of

__all__ = ["FEATURE_LOSSES", "FeatureTerms"]

logger = logging.get_logger(__name__)

_STATE = "distillation.safetensors"


@dataclass(frozen=True)
class FeatureLoss:
    """What a feature loss compares.

    Attributes:
        on: `hidden` states or `attentions` of the paired layers, or the last attention's `vectors`
            (queries, keys, values).
        function: A function of `feature_losses`; for `vectors`, the positions of those compared.
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
    "hidden_mse": FeatureLoss("hidden", feature_losses.hidden_mse),
    "hidden_cosine": FeatureLoss("hidden", feature_losses.hidden_cosine),
    "hidden_l1_cosine": FeatureLoss("hidden", feature_losses.hidden_l1_cosine),
    "attention": FeatureLoss("attentions", feature_losses.attention_mse),
    "minilm": FeatureLoss("vectors", feature_losses.relation_kl, vectors=(2,), last_attention=True),
    "minilm_v2": FeatureLoss("vectors", feature_losses.relation_kl, vectors=(0, 1, 2)),
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
        self._probe = probed(self.captures, any(loss.last_attention for loss in used))
        compared = {loss.on for loss in used} - {"vectors"}
        self._by = "hidden" if "hidden" in compared else "attentions"
        self._layers = layer_modules(self.student) if compared else []
        self._sizes = tuple(len(self._by_layer(seen)) for seen in self._probe) if compared else ()
        self.teacher_layers = self._chosen_teacher_layers()
        self._pairs: Pairs | None = None
        if compared and not isinstance(layer_map, str):
            check_layers(layer_map, self._sizes)
        self.packing = Packing(self._kept_layers(), self._probe[1])
        self._costs = np.zeros(1)
        self.relation_heads = self._fitting_heads(relation_heads) if needs["vectors"] else 0
        self.projections = self._make_projections(projection)
        if compared:
            logger.info(f"layers of student and teacher that are paired: {self.pairs()}")

    def pairs(self) -> Pairs:
        """Return the layers to compare in this step, of the student's those that are not closed."""
        if not self._sizes:
            return []
        alive = self._alive()
        if not isinstance(self.layer_map, str):
            return [pair for pair in self.layer_map if pair[0] in alive]
        if self.layer_map != "dynamic":
            number = self._sizes[1]
            return [(alive[s], t) for s, t in static_pairs(self.layer_map, len(alive), number)]
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
        pairs = self.pairs()
        first = [*seen.hidden, *seen.vectors, *seen.attentions][0]
        mask = position_mask(self.student, inputs, first.shape[-1 if first.ndim == 4 else 1])
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
                    parts.append(feature_losses.attention_kl(*last, mask))
            # All layers of an explicit map may be closed; then there is nothing to learn.
            result[name] = torch.stack(parts).mean(0) if parts else first.new_zeros(len(first))
        if self.layer_map == "dynamic" and self._sizes:
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
            closed = set(range(total.shape[1])) - set(self._alive())
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

    def _chosen_teacher_layers(self) -> list[int]:
        if self.layer_map != "dynamic" or not self._sizes:
            return []
        number = self._sizes[1]
        few = max(1, round(number / 3))
        return [t for _, t in static_pairs("uniform", few, number)]

    def _kept_layers(self) -> list[int]:
        if not self._probe[1].hidden:
            return []
        return self.teacher_layers or sorted({t for _, t in self.pairs()})

    def _by_layer(self, seen: Seen) -> list[Tensor]:
        """Return what layers are chosen by."""
        return seen.hidden if self._by == "hidden" else seen.attentions

    def _alive(self) -> list[int]:
        number, closed = self._sizes[0], closed_layers(self.student)
        if len(self._layers) != number:  # attention maps of some layers alone
            return list(range(number))
        return [i for i in range(number) if self._layers[i] not in closed] or [number - 1]

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
        theirs = self._by_layer(taught)

        def cost(student: Tensor, teacher: Tensor) -> float:
            if self._by == "hidden":
                each = feature_losses.hidden_mse(self._project(student, teacher), teacher, mask)
            else:
                each = feature_losses.attention_mse(student, teacher, mask)
            return each.double().sum().item()

        costs = np.array(
            [[cost(s, theirs[t]) for s in self._by_layer(seen)] for t in self.teacher_layers]
        )
        share = share_of(self.student)
        self._costs = self._costs + costs * (share is None or share.counts)
