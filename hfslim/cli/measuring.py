"""`hfslim measure` and `hfslim compare`: what models cost, and whether they agree."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from hfslim.cli.app import app, progress, show, working
from hfslim.cli.options import (
    BatchSize,
    BatchSizes,
    Calls,
    Data,
    Json,
    Length,
    Metric,
    Seed,
    workbench,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from hfslim.measuring.measurement import Measurement


@app.command(epilog="Example: `hfslim measure bert-sst2 bert-sst2-half --batch-size 1`")
def measure(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Hub ids or folders of classifiers.")
    ],
    batch_size: BatchSizes = None,
    length: Length = None,
    calls: Calls = 30,
    as_json: Json = False,
) -> None:
    """Measure parameters, multiply-accumulates, bytes and latency.

    The input is random and of the size that the model takes: 128 tokens or one second where a
    model leaves it open and `--length` says nothing. Models are timed one after the other;
    `hfslim compare` times two in turn, which a change of load does not disturb.
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
    show(as_json, values, lambda console: console.print(_costs(rows)))


def _costs(rows: list[tuple[str, Measurement]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

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
    data: Data = None,
    metric: Metric = None,
    batch_size: BatchSizes = None,
    length: Length = None,
    calls: Calls = 30,
    eval_batch_size: BatchSize = 32,
    seed: Seed = 42,
    as_json: Json = False,
) -> None:
    """Compare two models: size, speed, metric, and how often they agree.

    The two run in turn, call by call. With `--data`, both are judged on its evaluation split,
    each by its own processor; without, only size and speed are compared.
    """
    with working():
        from hfslim.anatomy.inputs import example_inputs
        from hfslim.measuring.measurement import compare as costs_of
        from hfslim.pipeline.opening import open_classifier
        from hfslim.pipeline.task_examples import agreement
        from hfslim.reporting.report import Quality, Report

        sources, quality, agreed, examples = (before, after), [], None, 0
        if data:
            benches = [workbench(source, data, metric, seed, eval_batch_size) for source in sources]
            one, other = (b.load_model(s) for b, s in zip(benches, sources, strict=True))
            shown = sys.stderr.isatty()
            first, second = benches[0].predict(one, shown), benches[1].predict(other, shown)
            agreed, examples = agreement(first, second), len(first.logits)
            where = f"evaluation, {examples:,} examples"
            name = benches[0].metric
            quality = [Quality(name, second.value, first.value, where, examples)]
            length = length or benches[1].stated_length
        else:
            one, other = (open_classifier(source)[1] for source in sources)
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
