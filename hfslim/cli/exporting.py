"""`hfslim export`: a file to serve a model from."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfslim.cli.app import app, asked, show, working
from hfslim.cli.options import (
    BatchSize,
    BatchSizes,
    Calls,
    Data,
    Json,
    Metric,
    Model,
    Output,
    Seed,
    check_empty,
    workbench,
)

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel

    from hfslim.hub.export import Export
    from hfslim.pipeline.task_examples import Workbench

FORMATS = ("onnx", "torch-export")


@app.command(
    epilog="Example: `hfslim export bert-sst2-half --format onnx --int8 --output bert-sst2-onnx`"
)
def export(
    model: Model,
    output: Output,
    format: Annotated[
        str,
        typer.Option(
            metavar="|".join(FORMATS),
            help="`onnx` for ONNX Runtime and others, `torch-export` for torch without the "
            "model's code.",
            autocompletion=lambda: list(FORMATS),
        ),
    ] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantize dynamically; only for onnx.")
    ] = False,
    data: Data = None,
    metric: Metric = None,
    batch_size: BatchSizes = None,
    calls: Calls = 30,
    eval_batch_size: BatchSize = 32,
    seed: Seed = 42,
    as_json: Json = False,
) -> None:
    """Export a model to a file that needs neither hfslim nor the model's code.

    The file is compared with the model before it is kept; with `--data`, both then judge the
    evaluation split, and the metric of each and their agreement are told. The batch is free, and
    the length where the model leaves it open. The folder gets the file, the processor, the config
    and `export_report.json`.
    """
    with working():
        from hfslim.hub.export import check_format
        from hfslim.hub.export import export as write_export
        from hfslim.pipeline.opening import explained, open_classifier

        with asked("--format"):
            check_format(format, int8)
        check_empty(output)
        if data:
            bench = workbench(model, data, metric, seed, eval_batch_size)
            loaded, processor = bench.load_model(model), bench.processor
        else:
            task, loaded = open_classifier(model)
            with explained(f"the processor of {model!r}"):
                processor = task.load_processor(model, loaded.config)
        chosen: Any = format
        sizes = batch_size or [1, 32]
        made = write_export(
            loaded.float(), output, chosen, int8, processor, batch_sizes=sizes, calls=calls
        )
        if data:
            made = replace(made, quality=_judged(bench, loaded, output))
            made.write(output)
    show(as_json, made.to_dict(), lambda console: console.print(_table(made)))


def _judged(bench: Workbench, model: PreTrainedModel, output: Path) -> dict[str, Any]:
    """Let the model and its export judge the evaluation examples."""
    from hfslim.hub.export import open_exported
    from hfslim.pipeline.task_examples import agreement

    shown = sys.stderr.isatty()
    by_torch = bench.predict(model, shown)
    exported = bench.predict(open_exported(output), shown)
    return {
        "metric": bench.metric,
        "torch": by_torch.value,
        "exported": exported.value,
        "agreement": agreement(by_torch, exported),
        "difference": float(abs(by_torch.logits - exported.logits).max()),
        "examples": len(by_torch.logits),
    }


def _table(made: Export) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(str(made.folder)), title_justify="left", show_header=False)
    axes = "; ".join(f"{name} [{', '.join(map(str, a))}]" for name, a in made.axes.items())
    table.add_row("format", made.format + (", int8" if made.int8 else ", float32"))
    table.add_row("inputs", escape(axes))
    table.add_row("bytes", f"{made.bytes:,}")
    table.add_row(
        "greatest difference of a logit",
        f"{made.difference:.2g}, allowed {made.tolerance * made.scale:.2g}",
    )
    for time in made.latency:
        table.add_row(
            f"p50 ms, batch {time.after.batch_size}",
            f"torch {time.before.p50_ms:.2f}, {time.after.device} {time.after.p50_ms:.2f}, "
            f"{time.speedup:.2f}x ({time.low:.2f} to {time.high:.2f}), "
            f"{time.after.threads} threads",
        )
    if made.quality:
        told = made.quality
        table.add_row(
            f"{told['metric']}, {told['examples']:,} examples",
            f"torch {told['torch']:.4f}, exported {told['exported']:.4f}; "
            f"agreement {told['agreement']:.2%}; logits differ by {told['difference']:.2g} at most",
        )
    return table
