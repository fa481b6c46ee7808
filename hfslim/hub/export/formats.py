"""Trace a model into an ONNX or torch.export file with transformers' exporters, and open it.

The exporters trace the live model, so layers of unequal width need no special code, and the file
needs neither hfslim nor the model's code.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel

from hfslim.hub.export.int8 import dynamic_quantizer
from hfslim.hub.export.probes import sample_inputs

__all__ = ["ExportError", "Format", "check_format", "open_exported", "write_traced"]

Axes = dict[str, tuple[int | str, ...]]
Format = Literal["onnx", "torch-export"]
FORMATS: tuple[Format, ...] = get_args(Format)
FREE_AXES = ("batch", "length")
OURS = ("hfslim", "quantization_config", "auto_map")
"""Fields of a config that describe how to rebuild the pruned model."""


class ExportError(RuntimeError):
    """The model cannot be exported, or the file does not compute what the model does."""


def check_format(format: str, int8: bool) -> None:
    """Check that a format exists, and that int8 is asked only for ONNX.

    Raises:
        ValueError: It does not; the message names those that exist.
    """
    if format not in FORMATS:
        raise ValueError(f"got {format!r}, expected one of {list(FORMATS)}")
    if int8 and format != "onnx":
        raise ValueError(f"int8 is for onnx, not for {format}: leave one of the two out")


def write_traced(
    model: PreTrainedModel, names: Sequence[str], folder: Path, format: Format, int8: bool
) -> Axes:
    """Write a model's file, `export.json` and config, and return the sizes of each input.

    A free size is `batch` or `length`. The model is in evaluation mode; `names` are its inputs
    beyond the main one, such as `attention_mask`.

    Raises:
        ExportError: The exporter fails, or its packages are missing.
    """
    exporters = _exporters()
    sample, free = sample_inputs(model, names)
    auto = torch.export.Dim.AUTO
    shapes = {name: dict.fromkeys(dims, auto) for name, dims in free.items()}
    if format == "onnx":
        exporter = exporters.OnnxExporter
        quantizer = dynamic_quantizer(exporters) if int8 else None
        config = exporters.OnnxConfig(dynamic_shapes=shapes, quantizer=quantizer)
    else:
        exporter = exporters.DynamoExporter
        config = exporters.DynamoConfig(dynamic_shapes=shapes)
    try:
        with _quiet():
            traced = exporter().export(model, sample, config)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(
            f"{type(model).__name__} cannot be exported to {format}: {reason}"
        ) from error
    # The file holds the shapes, so the config need not describe them.
    traced.config = copy.deepcopy(model.config)
    for name in OURS:
        vars(traced.config).pop(name, None)
    traced.save_pretrained(folder)
    return {
        name: tuple(
            FREE_AXES[min(dim, 1)] if dim in free[name] else size
            for dim, size in enumerate(tensor.shape)
        )
        for name, tensor in sample.items()
    }


def open_exported(folder: str | Path) -> Any:
    """Load an export on the CPU, with torch's number of threads.

    Args:
        folder: The folder that `export` wrote.

    Returns:
        A `transformers.exporters.ExportedModel`, which takes the model's inputs by name and returns
        the model's outputs.

    Raises:
        ExportError: The packages that run it are missing.
    """
    exporters = _exporters()
    options: dict[str, Any] = {}
    if json.loads((Path(folder) / "export.json").read_text())["export_format"] == "onnx":
        import onnxruntime

        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = torch.get_num_threads()
        session.log_severity_level = 3
        options = {"device": "cpu", "session_options": session}
    with _quiet():
        return exporters.ExportedModel.from_pretrained(str(folder), **options)


def _exporters() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
        from transformers import exporters
    except ImportError as error:
        raise ExportError(
            f"exporting needs {error.name}: pip install 'hfslim[export]'"
            + (" and a newer transformers" if "transformers" in str(error.name) else "")
        ) from error
    return exporters


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' progress messages and warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
