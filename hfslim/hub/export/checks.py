"""Compare an exported file with its model: logits and latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hfslim.hub.export.formats import ExportError
from hfslim.measuring.timing import (
    PairedLatency,
    call_seconds,
    describe_inputs,
    in_turn,
    paired,
    summarise,
)

__all__ = ["check_exportable", "greatest_difference", "time_in_turn"]


def check_exportable(model: PreTrainedModel, folder: Path) -> None:
    """Check before the work that a model can be exported to a folder.

    Raises:
        ValueError: The folder is not empty, or the model is not in float32 on the CPU.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} is there and not empty: choose another folder")
    found = next(model.parameters())
    if found.dtype != torch.float32 or found.device.type != "cpu":
        raise ValueError(
            f"the model is {found.dtype} on {found.device}, exports are made and checked in "
            "float32 on the CPU: call model.float().cpu() first"
        )


def greatest_difference(
    model: PreTrainedModel, exported: Any, inputs: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[float, float]:
    """Return the greatest difference of a logit, and the greatest logit, at least 1.

    Raises:
        ExportError: The file does not run on an input, or its logits have another shape or are not
            finite.
    """
    difference, scale = 0.0, 1.0
    for batch in inputs:
        expected = model(**batch).logits
        try:
            found = exported(**batch).logits
        except Exception as error:
            raise ExportError(
                f"the exported file does not run on {describe_inputs(batch)}: {error}: it was "
                "removed"
            ) from error
        if found.shape != expected.shape or not torch.isfinite(found).all():
            raise ExportError(
                f"the exported file gives {list(found.shape)} logits where the model gives "
                f"{list(expected.shape)}, or logits that are not finite: it was removed"
            )
        difference = max(difference, (found - expected).abs().max().item())
        scale = max(scale, expected.abs().max().item())
    return difference, scale


def time_in_turn(
    model: PreTrainedModel,
    exported: Any,
    inputs: Mapping[str, torch.Tensor],
    int8: bool,
    calls: int,
) -> PairedLatency:
    """Return the latency of the model by torch and of the file, timed in turn."""
    batch_size = len(next(iter(inputs.values())))
    clocks = [lambda run=run: call_seconds(run, inputs) for run in (model, exported)]
    first, second = in_turn(clocks, calls, warmup=3)
    runtime = "ONNX Runtime" if exported.export_format == "onnx" else "torch.export"
    dtype = "int8" if int8 else "float32"
    before = summarise(first, batch_size, "float32", "cpu")
    return paired(first, second, before, summarise(second, batch_size, dtype, f"cpu, {runtime}"))
