"""Export a classifier, and keep the file only if it computes what the model does."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hfslim.anatomy.adapters import check_merged
from hfslim.hub.export.checks import check_exportable, greatest_difference, time_in_turn
from hfslim.hub.export.formats import (
    Axes,
    ExportError,
    Format,
    check_format,
    open_exported,
    write_traced,
)
from hfslim.hub.export.probes import input_names, inputs_of, probes
from hfslim.measuring.timing import PairedLatency, describe_inputs, evaluating
from hfslim.reporting.staged_writes import whole_folder

__all__ = ["Export", "export"]

logger = logging.getLogger(__name__)

TOLERANCE = {False: 1e-4, True: 0.25}
"""Greatest difference of a logit, as a fraction of the greatest logit or of 1; with int8 True."""
REPORT = "export_report.json"


@dataclass(frozen=True)
class Export:
    """An exported file, its difference from the model, and its latency.

    Attributes:
        folder: The folder of the file, `export.json`, the config, the processor and this report.
        format: `onnx` or `torch-export`.
        int8: Whether weights are int8, and activations where matrices are multiplied.
        axes: Sizes of each input; a free size is `batch` or `length`.
        difference: Greatest difference of a logit from the model's.
        scale: Greatest logit of the model, at least 1.
        tolerance: The fraction of `scale` that the difference may be.
        checked: The inputs that were compared.
        bytes: Size of the file with its weights.
        latency: The model by torch, then the file, timed in turn at each batch size.
        quality: Metrics of both on real examples, if that was asked.
    """

    folder: Path
    format: Format
    int8: bool
    axes: Axes
    difference: float
    scale: float
    tolerance: float
    checked: tuple[str, ...]
    bytes: int
    latency: tuple[PairedLatency, ...]
    quality: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the export as nested dictionaries and lists of plain values, ready for JSON."""
        axes = {name: list(sizes) for name, sizes in self.axes.items()}
        return {**asdict(self), "folder": str(self.folder), "axes": axes}

    def write(self, folder: str | Path) -> None:
        """Write `export_report.json`."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        (Path(folder) / REPORT).write_text(text + "\n", encoding="utf-8")


def export(
    model: PreTrainedModel,
    folder: str | Path,
    format: Format = "onnx",
    int8: bool = False,
    processor: Any = None,
    batches: Sequence[Mapping[str, torch.Tensor]] = (),
    batch_sizes: Sequence[int] = (1, 32),
    calls: int = 30,
) -> Export:
    """Export a classifier, and keep the file only if it computes what the model does.

    The batch is free, and so is the length of texts and recordings if the model leaves it open.
    The file is compared with the model on random inputs of several sizes, texts with padding, and
    on `batches`: no logit may differ by more than 1e-4 (0.25 with int8) of the greatest logit or
    of 1.

    Args:
        model: The classifier, in float32 and on the CPU.
        folder: A new or empty folder, for `model.onnx` with its weights in `model.onnx.data`, or
            `model.pt2`; `export.json`, which `transformers.exporters.ExportedModel` reads; the
            config; the processor; and `export_report.json`.
        format: `onnx` or `torch-export`.
        int8: Whether ONNX Runtime quantizes dynamically: weights once, activations at each call.
            Only for `onnx`. A weight has a scale for each channel.
        processor: Tokenizer, image processor or feature extractor. It decides which inputs the
            file takes, such as `token_type_ids`, and is saved beside the file.
        batches: Real inputs to compare on as well.
        batch_sizes: Batch sizes at which both are timed, in turn.
        calls: Number of timed calls of each.

    Returns:
        The file, its difference from the model, and its latency.

    Raises:
        ExportError: The exporter fails, its packages are missing, or the file does not compute what
            the model does. Nothing is left behind.
        ValueError: An argument is wrong, or the folder is not empty.
    """
    folder = Path(folder)
    check_merged(model)
    check_format(format, int8)
    check_exportable(model, folder)
    with whole_folder(folder) as work:
        with evaluating(model):
            names = input_names(model, processor)
            axes = write_traced(model, names, work, format, int8)
            exported = open_exported(work)
            inputs = [*probes(model, names), *batches]
            difference, scale = greatest_difference(model, exported, inputs)
            tolerance = TOLERANCE[int8]
            if not difference <= tolerance * scale:
                raise ExportError(
                    f"the {format} file's logits differ by {difference:.2g} from the model's, more "
                    f"than {tolerance:g} of their size ({scale:.3g}): it was removed"
                )
            latency = tuple(
                time_in_turn(model, exported, inputs_of(model, names, size), int8, calls)
                for size in batch_sizes
            )
        result = Export(
            folder,
            format,
            int8,
            axes,
            difference,
            scale,
            tolerance,
            checked=tuple(dict.fromkeys(describe_inputs(one) for one in inputs)),
            bytes=sum(path.stat().st_size for path in work.glob("model.*")),
            latency=latency,
        )
        if processor is not None:
            processor.save_pretrained(work)
        result.write(work)
    logger.info("exported to %s, off by %.2g at most", folder, difference)
    return result
