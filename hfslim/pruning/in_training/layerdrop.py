"""LayerDrop: a callback for any Trainer, also the stock one."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers import TrainingArguments as Arguments

from hfslim.anatomy.discovery import find_units
from hfslim.pruning.gates.gates import Gates
from hfslim.training.callback_requirements import check_not_compiled

logger = logging.getLogger(__name__)


class LayerDropCallback(TrainerCallback):
    """Skips random layers in training, so that layers can be removed afterwards.

    Each step draws the layers to skip, among the removable ones, from (seed, step): every process,
    every accumulation step and every resumed run skips the same layers. The residual stream
    bypasses a skipped layer, whose parameters stay in the graph. Evaluation runs all layers.

    (Fan et al. 2019, arXiv 1909.11556, for pre-training; in fine-tuning combine it with
    distillation.)

    Args:
        p: Probability that a layer is skipped; 0.5 prepares for halving the depth.
        seed: Seed of the draw.

    Raises:
        ValueError: `p` is not in [0, 1); or, when training begins, it uses torch.compile.
    """

    def __init__(self, p: float = 0.2, seed: int = 0) -> None:
        if not 0 <= p < 1:
            raise ValueError(f"p is a probability in [0, 1), got {p}")
        self.p, self.seed = p, seed
        self._gates: Gates = None  # type: ignore[assignment]  # made when training begins

    def on_train_begin(  # type: ignore[override]
        self, args: Arguments, state: TrainerState, *_: Any, model: PreTrainedModel, **__: Any
    ) -> None:
        """Gate the layers."""
        check_not_compiled(args, "LayerDropCallback")
        own = getattr(model.config, "layerdrop", 0.0)
        if own:
            logger.warning("the model drops layers itself (config.layerdrop=%g); both apply", own)
        units = find_units(model).of(["layers"])
        self._gates = Gates(model, units, owner=type(self).__name__).attach()

    def on_step_begin(self, args: Arguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Draw the layers that this step skips."""
        draw = np.random.default_rng([self.seed, state.global_step])
        for site in self._gates.units:
            skipped = np.flatnonzero(draw.random(site.size) < self.p)
            self._gates.close_layers(site, frozenset(skipped.tolist()) - set(site.fixed))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Run all layers again."""
        for site in self._gates.units:
            self._gates.close_layers(site, frozenset())

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Take the gates out."""
        self._gates.detach()
