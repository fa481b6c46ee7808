"""Write a classifier as an ONNX or a torch.export file, checked against the model itself.

The exporters of transformers trace the live model, so layers of unequal width need nothing of their
own, and what they write needs neither hfslim nor the model's code.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel

from hfslim.anatomy.adapters import check_merged
from hfslim.hub.export.probes import input_names, inputs_of, probes, sample_inputs
from hfslim.measuring.timing import (
    PairedLatency,
    call_seconds,
    describe_inputs,
    evaluating,
    in_turn,
    paired,
    summarise,
)
from hfslim.reporting.staged_writes import whole_folder

__all__ = ["FORMATS", "Export", "ExportError", "Format", "check_format", "export", "open_exported"]

logger = logging.getLogger(__name__)

Format = Literal["onnx", "torch-export"]
FORMATS: tuple[Format, ...] = get_args(Format)
TOLERANCE = {False: 1e-4, True: 0.25}
"""Greatest difference of a logit, as a fraction of the greatest logit or of 1; with int8 True."""
REPORT = "export_report.json"
_OURS = ("hfslim", "quantization_config", "auto_map")


class ExportError(RuntimeError):
    """The model cannot be exported, or the export does not compute what the model does."""


@dataclass(frozen=True)
class Export:
    """A file that computes what the model does, and how that is known.

    Attributes:
        folder: Where it is: the file, `export.json`, the config, the processor and this report.
        format: `onnx` or `torch-export`.
        int8: Whether weights are int8, and activations where matrices are multiplied.
        axes: Sizes of each input; those that are free go by their names.
        difference: Greatest difference of a logit from the model's.
        scale: Greatest logit of the model, at least 1.
        tolerance: The part of `scale` that the difference may be.
        checked: The inputs that were compared.
        bytes: Size of the file with its weights.
        latency: The model by torch, then the file, timed in turn at each batch size.
        quality: What both say of real examples, if that was asked.
    """

    folder: Path
    format: Format
    int8: bool
    axes: Mapping[str, tuple[int | str, ...]]
    difference: float
    scale: float
    tolerance: float
    checked: tuple[str, ...]
    bytes: int
    latency: tuple[PairedLatency, ...]
    quality: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The export as nested dictionaries and lists of plain values, ready for JSON."""
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

    The batch is free, and so is the length of texts and recordings where the model leaves it open.
    The file is compared with the model on random inputs of several sizes, texts with padding, and
    on `batches`: no logit may differ by more than 1e-4, with int8 by more than a quarter, of the
    greatest logit or of 1.

    Args:
        model: The classifier, in float32 and on the CPU.
        folder: A new or empty folder. Inside go `model.onnx` with its weights in `model.onnx.data`,
            or `model.pt2`; `export.json`, which `transformers.exporters.ExportedModel` reads; the
            config; the processor; and `export_report.json`.
        format: `onnx` or `torch-export`.
        int8: Whether to quantize, by ONNX Runtime and dynamically: weights once, activations at
            each call. Only for `onnx`. A weight has a scale for each channel, unless a layer has
            lost every unit of a kind.
        processor: Tokenizer, image processor or feature extractor. It decides which inputs the
            file takes, such as `token_type_ids`, and is saved beside the file.
        batches: Real inputs to compare on as well.
        batch_sizes: Examples per call at which both are timed, in turn.
        calls: Number of timed calls of each.

    Returns:
        What was written, how far it is from the model, and how fast it is.

    Raises:
        ExportError: The exporter fails, its packages are missing, or the file does not compute what
            the model does. Nothing is left behind.
        ValueError: An argument is wrong, or the folder holds something.
    """
    folder = Path(folder)
    check_merged(model)
    _check(model, folder, format, int8)
    with whole_folder(folder) as work:
        with evaluating(model):
            names = input_names(model, processor)
            axes = _trace(model, names, work, format, int8)
            exported = open_exported(work)
            inputs = [*probes(model, names), *batches]
            difference, scale = _compare(model, exported, inputs)
            tolerance = TOLERANCE[int8]
            if not difference <= tolerance * scale:
                raise ExportError(
                    f"the {format} file's logits differ by {difference:.2g} from the model's, more "
                    f"than {tolerance:g} of their size ({scale:.3g}): it was removed"
                )
            times = tuple(
                _time(model, exported, inputs_of(model, names, size), int8, calls)
                for size in batch_sizes
            )
        size = sum(path.stat().st_size for path in work.glob("model.*"))
        checked = tuple(dict.fromkeys(describe_inputs(one) for one in inputs))
        result = Export(
            folder, format, int8, axes, difference, scale, tolerance, checked, size, times
        )
        if processor is not None:
            processor.save_pretrained(work)
        result.write(work)
    logger.info("exported to %s, off by %.2g at most", folder, difference)
    return result


def open_exported(folder: str | Path) -> Any:
    """Load an export on the CPU with as many threads as torch has.

    Args:
        folder: What `export` wrote.

    Returns:
        A `transformers.exporters.ExportedModel`: it takes the model's inputs by name and returns
        what the model does.

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
    with _hushed():
        return exporters.ExportedModel.from_pretrained(str(folder), **options)


def check_format(format: str, int8: bool) -> None:
    """Refuse a format that is not known, or not with int8.

    Raises:
        ValueError: Naming what is.
    """
    if format not in FORMATS:
        raise ValueError(f"got {format!r}, expected one of {list(FORMATS)}")
    if int8 and format != "onnx":
        raise ValueError(f"int8 is for onnx, not for {format}: leave one of the two out")


def _check(model: PreTrainedModel, folder: Path, format: str, int8: bool) -> None:
    check_format(format, int8)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} is there and not empty: choose another folder")
    found = next(model.parameters())
    if found.dtype != torch.float32 or found.device.type != "cpu":
        raise ValueError(
            f"the model is {found.dtype} on {found.device}, exports are made and checked in "
            "float32 on the CPU: call model.float().cpu() first"
        )


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


def _trace(
    model: PreTrainedModel, names: Sequence[str], folder: Path, format: Format, int8: bool
) -> dict[str, tuple[int | str, ...]]:
    exporters = _exporters()
    sample, free = sample_inputs(model, names)
    auto = torch.export.Dim.AUTO
    shapes = {name: dict.fromkeys(dims, auto) for name, dims in free.items()}
    if format == "onnx":
        exporter = exporters.OnnxExporter
        quantizer = _quantizer(model) if int8 else None
        config = exporters.OnnxConfig(dynamic_shapes=shapes, quantizer=quantizer)
    else:
        exporter = exporters.DynamoExporter
        config = exporters.DynamoConfig(dynamic_shapes=shapes)
    try:
        with _hushed():
            traced = exporter().export(model, sample, config)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(
            f"{type(model).__name__} cannot be exported to {format}: {reason}"
        ) from error
    # The file holds the shapes, so the config need not tell how to rebuild the model.
    traced.config = copy.deepcopy(model.config)
    for name in _OURS:
        vars(traced.config).pop(name, None)
    traced.save_pretrained(folder)
    free_names = ("batch", "length")
    return {
        name: tuple(
            free_names[min(dim, 1)] if dim in free[name] else size
            for dim, size in enumerate(t.shape)
        )
        for name, t in sample.items()
    }


def _quantizer(model: PreTrainedModel) -> Any:
    """Return the quantizer of a model: a scale for each channel is far nearer to its logits."""
    # ONNX Runtime fails on a weight that has no channel.
    empty = [name for name, weight in model.named_parameters() if not weight.numel()]
    if empty:
        logger.warning(
            "int8 with one scale for each weight, not for each channel, which is less exact: "
            "%d weights are empty, such as %s",
            len(empty),
            empty[0],
        )
    exporters = _exporters()
    config = exporters.OnnxRuntimeDynamicConfig(per_channel=not empty)
    return exporters.OnnxRuntimeQuantizer(config)


def _compare(
    model: PreTrainedModel, exported: Any, inputs: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[float, float]:
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


def _time(
    model: PreTrainedModel,
    exported: Any,
    inputs: Mapping[str, torch.Tensor],
    int8: bool,
    calls: int,
) -> PairedLatency:
    batch_size = len(next(iter(inputs.values())))
    runs = (model, exported)
    clocks = [lambda run=run: call_seconds(run, inputs) for run in runs]
    first, second = in_turn(clocks, calls, warmup=3)
    runtime = "ONNX Runtime" if exported.export_format == "onnx" else "torch.export"
    dtype = "int8" if int8 else "float32"
    before = summarise(first, batch_size, "float32", "cpu")
    return paired(first, second, before, summarise(second, batch_size, dtype, f"cpu, {runtime}"))


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep back what the exporters say of their own progress."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "transformers", "root")]
    before = [one.level for one in noisy]
    for one in noisy:
        one.setLevel(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        for one, level in zip(noisy, before, strict=True):
            one.setLevel(level)
