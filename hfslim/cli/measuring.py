"""`hfslim measure` and `hfslim compare`: the costs of models, and their agreement."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hfslim.cli import options
from hfslim.cli.command import app, progress, show, working

if TYPE_CHECKING:
    from hfslim.measuring.measurement import Measurement


@app.command(epilog="Example: `hfslim measure bert-sst2 bert-sst2-half --batch-size 1`")
def measure(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Hub ids or folders of classifiers.")
    ],
    batch_size: options.BatchSizes = None,
    length: options.Length = None,
    calls: options.Calls = 30,
    as_json: options.Json = False,
) -> None:
    """Measure parameters, multiply-accumulates, bytes and latency.

    The input is random and has the size that the model takes. Without `--length` it has 128 tokens
    or one second if the model allows several lengths. Models are timed one after the other;
    `hfslim compare` times two in turn, so that a change of load affects both.
    """
    with working():
        from hfslim.anatomy.inputs import example_inputs
        from hfslim.measuring.measurement import measure as cost_of
        from hfslim.pipeline.opening import open_classifier

        rows = []
        cases = [(source, size) for source in models for size in batch_size or [1, 32]]
        for source, size in progress(cases, "measuring"):
            _, model = open_classifier(source)
            inputs = example_inputs(model, size, length=length)
            rows.append((source, cost_of(model, inputs, calls=calls)))
    values = {"models": [{"model": name, **one.to_dict()} for name, one in rows]}
    show(as_json, values, _costs(rows))


def _costs(rows: list[tuple[str, Measurement]]) -> Table:
    table = Table(caption_justify="left")
    table.add_column("model", overflow="fold")
    for heading in ("batch", "parameters", "MACs", "bytes", "p50 ms", "p95 ms", "examples/s"):
        table.add_column(heading, justify="right")
    stated = []
    for name, one in rows:
        time = one.latency
        counts = (f"{n:,}" for n in (time.batch_size, one.parameters, one.macs, one.bytes))
        times = (f"{time.p50_ms:.2f}", f"{time.p95_ms:.2f}", f"{time.throughput:,.1f}")
        table.add_row(escape(name), *counts, *times)
        stated.append(
            f"Batch {time.batch_size}: {one.inputs}; {time.device}, {time.dtype}, "
            f"{time.threads} threads, {time.calls} calls."
        )
    table.caption = escape("\n".join(dict.fromkeys(stated)))
    return table


@app.command(
    epilog="Example: `hfslim compare bert-sst2 bert-sst2-half --data nyu-mll/glue "
    "--data dataset_config_name=sst2`"
)
def compare(
    before: Annotated[
        str, typer.Argument(metavar="BEFORE", help="Hub id or folder of the first model.")
    ],
    after: Annotated[
        str, typer.Argument(metavar="AFTER", help="Hub id or folder of the second model.")
    ],
    data: options.Data = None,
    metric: options.Metric = None,
    batch_size: options.BatchSizes = None,
    length: options.Length = None,
    calls: options.Calls = 30,
    eval_batch_size: options.BatchSize = 32,
    seed: options.Seed = 42,
    as_json: options.Json = False,
) -> None:
    """Compare two models: size, speed, metric, and how often they agree.

    The two run in turn, call by call. With `--data`, both are evaluated on the evaluation split,
    each with its own processor; without it, only size and speed are compared.
    """
    with working():
        from hfslim.anatomy.inputs import example_inputs
        from hfslim.measuring.measurement import compare as costs_of
        from hfslim.pipeline.opening import open_classifier, task_of
        from hfslim.reporting.report import Quality, Report

        tasks = [task_of(source) for source in (before, after)]
        if tasks[0] != tasks[1]:
            raise typer.BadParameter(
                f"{before} is for {tasks[0]} and {after} for {tasks[1]}: give two models of one "
                "task",
                param_hint="'AFTER'",
            )
        quality, agreed, examples = [], None, 0
        if data:
            own, theirs = (
                options.open_examples(source, data, metric, seed, eval_batch_size)
                for source in (before, after)
            )
            one, other = own.load_model(before), theirs.load_model(after)
            shown = sys.stderr.isatty()
            first, second = own.predict(one, shown), theirs.predict(other, shown)
            agreed, examples = first.agreement(second), len(first.logits)
            quality = [Quality(own.metric, second.value, first.value, own.stated_data, examples)]
            length = length or theirs.stated_length
        else:
            one, other = (open_classifier(source)[1] for source in (before, after))
        comparisons = [
            costs_of(one, other, example_inputs(other, size, length=length), calls=calls)
            for size in progress(batch_size or [1, 32], "timing")
        ]
    report = Report(f"{before} → {after}", comparisons, quality)

    def draw(console: Console) -> None:
        report.print(console)
        if agreed is not None:
            console.print(f"The two agree on {agreed:.1%} of {examples:,} examples.")

    show(as_json, {"before": before, **report.to_dict(), "model": after, "agreement": agreed}, draw)
