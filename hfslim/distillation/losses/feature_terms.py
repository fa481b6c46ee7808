"""The terms of a distillation objective that compare hidden states and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging

from hfslim.anatomy.adapters import base_of
from hfslim.anatomy.layer_modules import layer_modules
from hfslim.distillation.losses import feature_losses
from hfslim.distillation.losses.capture import Capture, CapturedStates, Packing, position_mask
from hfslim.distillation.losses.comparable import probe
from hfslim.distillation.losses.feature_losses import FEATURE_LOSSES
from hfslim.distillation.losses.layer_maps import (
    Pairs,
    check_layers,
    dynamic_pairs,
    static_pairs,
)
from hfslim.pruning.gates.gates import closed_layers
from hfslim.training.batch_shares import share_of

__all__ = ["FeatureTerms"]

logger = logging.get_logger(__name__)

_STATE = "distillation.safetensors"


class FeatureTerms:
    """Computes the feature losses of one training: capture, layer map, projections.

    Both models run once on a small random input, so that models that cannot be compared are refused
    before training.

    Args:
        student: The student, not wrapped.
        teacher: The teacher.
        names: Names of `FEATURE_LOSSES`.
        layer_map: A name of `LAYER_MAPS`, or pairs of layers.
        projection: Whether hidden states are projected to the teacher's width where it differs.
        relation_heads: Number of relation heads; by default the largest that fits both models and
            is at most the teacher's number of heads.

    Attributes:
        packing: The teacher's states that the losses need, as one tensor.
        projections: Linear maps by `{student width}-{teacher width}`; trained with the student,
            saved in training checkpoints and in no exported model.

    Raises:
        ValueError: The two models cannot be compared in this way.
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
        self._probe = probe(self.captures, any(loss.last_attention for loss in used))
        compared = {loss.on for loss in used} - {"vectors"}
        self._by = "hidden" if "hidden" in compared else "attentions"
        self._layers = layer_modules(self.student) if compared else []
        self._sizes = (
            tuple(len(self._by_layer(states)) for states in self._probe) if compared else ()
        )
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
        """Return the pairs of layers to compare in this step, without closed student layers."""
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

    def losses(
        self, student: CapturedStates, teacher: CapturedStates, inputs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Compute each loss.

        Args:
            student: The student's states.
            teacher: The teacher's states on the same batch.
            inputs: The student's batch.

        Returns:
            `[batch]` by name; losses on layers are means over the pairs.
        """
        result: dict[str, Tensor] = {}
        pairs = self.pairs()
        first = [*student.hidden, *student.vectors, *student.attentions][0]
        mask = position_mask(self.student, inputs, first.shape[-1 if first.ndim == 4 else 1])
        projected = {
            (s, t): self._project(student.hidden[s], teacher.hidden[t])
            for s, t in pairs
            if student.hidden
        }
        for name in self.names:
            loss = FEATURE_LOSSES[name]
            if loss.on == "hidden":
                parts = [loss.function(projected[s, t], teacher.hidden[t], mask) for s, t in pairs]
            elif loss.on == "attentions":
                parts = [
                    loss.function(student.attentions[s], teacher.attentions[t], mask)
                    for s, t in pairs
                ]
            else:
                parts = [
                    loss.function(student.vectors[i], teacher.vectors[i], self.relation_heads, mask)
                    for i in loss.vectors
                ]
                if loss.last_attention:
                    last = student.attentions[-1], teacher.attentions[-1]
                    parts.append(feature_losses.attention_kl(*last, mask))
            # All layers of an explicit map may be closed; the loss is 0 then.
            result[name] = torch.stack(parts).mean(0) if parts else first.new_zeros(len(first))
            if result[name].shape != (len(first),):
                raise ValueError(
                    f"the feature loss {name!r} returned shape {list(result[name].shape)}; "
                    f"expected one value per example, [{len(first)}]."
                )
        if self.layer_map == "dynamic" and self._sizes:
            self._add_costs(student, teacher, mask)
        return result

    def pairs_are_kept(self) -> bool:
        """Return whether `packing` holds the teacher layers that this step compares."""
        return not self.packing.layers or {t for _, t in self.pairs()} <= set(self.packing.layers)

    def mask(self, positions: int, inputs: dict[str, Any]) -> Tensor:
        """Return the mask of the positions that count, `[batch or 1, positions]` bool."""
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
        """Write the projections and the dynamic layer map into a checkpoint."""
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

    def _by_layer(self, states: CapturedStates) -> list[Tensor]:
        """Return the tensors by which a dynamic map chooses layers."""
        return states.hidden if self._by == "hidden" else states.attentions

    def _alive(self) -> list[int]:
        number, closed = self._sizes[0], closed_layers(self.student)
        if len(self._layers) != number:  # Only some layers have attention maps.
            return list(range(number))
        return [i for i in range(number) if self._layers[i] not in closed] or [number - 1]

    def _fitting_heads(self, asked: int | None) -> int:
        widths = [x.shape[-1] for states in self._probe for x in states.vectors]
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
        hidden = [[x.shape[-1] for x in states.hidden] for states in self._probe]
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
    def _add_costs(
        self, student: CapturedStates, teacher: CapturedStates, mask: Tensor | None
    ) -> None:
        taught = self._by_layer(teacher)

        def cost(s: Tensor, t: Tensor) -> float:
            if self._by == "hidden":
                each = feature_losses.hidden_mse(self._project(s, t), t, mask)
            else:
                each = feature_losses.attention_mse(s, t, mask)
            return each.double().sum().item()

        costs = np.array(
            [[cost(s, taught[t]) for s in self._by_layer(student)] for t in self.teacher_layers]
        )
        share = share_of(self.student)
        self._costs = self._costs + costs * (share is None or share.counts)
