"""`hfslim export`: write a model to a file for inference."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from hfslim.cli import options
from hfslim.cli.command import app, asked, show, working

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfslim.hub.export.exporting import Export
    from hfslim.pipeline.task_examples import TaskExamples

FORMATS = ("onnx", "torch-export")


@app.command(
    epilog="Example: `hfslim export bert-sst2-half --format onnx --int8 --output bert-sst2-onnx`"
)
def export(
    model: options.Model,
    output: options.Output,
    format: Annotated[
        str,
        typer.Option(
            metavar="|".join(FORMATS),
            help="`onnx` for ONNX Runtime and others, `torch-export` for torch without the "
            "model's code.",
            autocompletion=lambda: list(FORMATS),
            callback=options.one_of(FORMATS),
        ),
    ] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantize dynamically; only for onnx.")
    ] = False,
    data: options.Data = None,
    metric: options.Metric = None,
    batch_size: options.BatchSizes = None,
    calls: options.Calls = 30,
    eval_batch_size: options.BatchSize = 32,
    seed: options.Seed = 42,
    as_json: options.Json = False,
) -> None:
    """Export a model to a file that needs neither hfslim nor the model's code.

    The outputs of the file are compared with those of the model before it is kept. With `--data`,
    both are evaluated on the evaluation split, and their metrics and agreement are reported. The
    batch size is free, and so is the length unless the model fixes it. The folder contains the
    file, the processor, the config and `export_report.json`.
    """
    with working():
        from hfslim.hub.export import check_format
        from hfslim.hub.export import export as write_export
        from hfslim.pipeline.opening import explained, open_classifier

        with asked("--format"):
            check_format(format, int8)
        options.check_empty(output)
        if data:
            examples = options.open_examples(model, data, metric, seed, eval_batch_size)
            loaded, processor = examples.load_model(model), examples.processor
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
            made = replace(made, quality=_evaluated(examples, loaded, output))
            made.write(output)
    show(as_json, made.to_dict(), _table(made))


def _evaluated(examples: TaskExamples, model: PreTrainedModel, output: Path) -> dict[str, Any]:
    """Evaluate the model and its export on the evaluation examples."""
    from hfslim.hub.export.exporting import open_exported

    shown = sys.stderr.isatty()
    by_torch = examples.predict(model, shown)
    exported = examples.predict(open_exported(output), shown)
    return {
        "metric": examples.metric,
        "torch": by_torch.value,
        "exported": exported.value,
        "agreement": by_torch.agreement(exported),
        "difference": float(abs(by_torch.logits - exported.logits).max()),
        "examples": len(by_torch.logits),
    }


def _table(made: Export) -> Table:
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
        both = made.quality
        table.add_row(
            f"{both['metric']}, {both['examples']:,} examples",
            f"torch {both['torch']:.4f}, exported {both['exported']:.4f}; "
            f"agreement {both['agreement']:.2%}; logits differ by {both['difference']:.2g} at most",
        )
    return table
