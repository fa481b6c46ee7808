"""The proof that a cut is exact: the logits of the cut model equal those of the gated model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hfslim.anatomy.inputs import example_inputs, text_positions
from hfslim.anatomy.structure import Structure
from hfslim.anatomy.units import Units
from hfslim.measuring.timing import evaluating
from hfslim.pruning.gates.gates import Gates
from hfslim.training.objective import logits_of

logger = logging.getLogger(__name__)

Settings = dict[str, Any]
Returns = dict[str, Settings]
"""The form of each attention module's output, as settings of the class that may replace it."""

PROBE_EXAMPLES = 2
PROBE_LENGTH = {"input_ids": 16, "input_values": 4000, "input_features": 64}
RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
HALF_TOLERANCE = 5e-2


def check_gates(model: PreTrainedModel, units: Units) -> None:
    """Raise a RuntimeError if one forward pass does not call every gate on a model's units."""
    with Gates(model, units) as gates:
        probe_logits(model)
        gates.check_fired()


def attention_returns(model: PreTrainedModel, units: Units) -> Returns:
    """Run a model once, and return the form of each attention module's output."""
    return run_gated(model, units, units.full(), probe_inputs(model))[1]


def probe_logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of a model on `probe_inputs`."""
    return _logits(model, probe_inputs(model))


def probe_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return small random inputs of a model, no longer than its table of positions."""
    length = PROBE_LENGTH.get(model.main_input_name)
    if length is not None and model.main_input_name == "input_ids":
        length = min(length, text_positions(model) or length)
    return example_inputs(model, batch_size=PROBE_EXAMPLES, length=length)


def run_gated(
    model: PreTrainedModel, units: Units, structure: Structure, inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, Returns]:
    """Run the gated model; return its logits and the form of each attention module's output."""
    returns: Returns = {}

    def record(path: str) -> Any:
        def hook(_: nn.Module, __: tuple, output: Any) -> None:
            returns[path] = {"returns": 0 if isinstance(output, torch.Tensor) else len(output)}
            if isinstance(output, list):
                returns[path]["listed"] = True

        return hook

    attentions = [site.path for site in units if site.kind == "heads"]
    handles = [model.get_submodule(p).register_forward_hook(record(p)) for p in attentions]
    try:
        # Gates need not be called on sites that keep all units.
        cut = [e for e in structure if len(e.kept) < e.total]
        gates = Gates(model, Units(tuple(units.site(e.kind, e.path) for e in cut)))
        gates.set(Structure(tuple(cut)))
        with gates:
            logits = _logits(model, inputs)
            gates.check_fired()
    finally:
        for handle in handles:
            handle.remove()
    return logits, returns


def warn_if_no_effect(
    expected: torch.Tensor, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]
) -> None:
    """Warn if gates change the logits so little that `check_equal` cannot detect a wrong cut."""
    effect = (_logits(model, inputs) - expected).abs().max().item()
    if effect <= _tolerance(expected):
        logger.warning(
            "the removed units change the logits of %s by %.2g on the inputs of the check, too "
            "little to check in %s that the cut is exact: cut the trained model, in float32, or "
            "pass `inputs` of its task",
            type(model).__name__,
            effect,
            str(expected.dtype).removeprefix("torch."),
        )


def check_equal(
    expected: torch.Tensor, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]
) -> None:
    """Raise a RuntimeError if a cut model does not run, or differs from the gated model."""
    remedy = (
        "so this family cannot be cut like this; nothing was changed. Leave the kind of unit that "
        "causes it out of `units`"
    )
    try:
        found = _logits(model, inputs)
    except Exception as error:
        raise RuntimeError(f"the cut model does not run ({error}), {remedy}") from error
    if not torch.isfinite(expected).all():
        raise RuntimeError("the gated model's output is not finite, so the cut cannot be checked")
    difference = (found - expected).abs().max().item()
    if not difference <= _tolerance(expected):
        raise RuntimeError(
            f"the cut model differs from the gated one by {difference:.2g} in its logits, {remedy}"
        )


def _tolerance(expected: torch.Tensor) -> float:
    relative = RELATIVE_TOLERANCE.get(expected.dtype, HALF_TOLERANCE)
    return relative * max(1.0, expected.abs().max().item())


def _logits(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with evaluating(model):
        return logits_of(model(**inputs))
