"""Whether budgets are kept: a latency as measured afterwards, a drop on data that nothing has seen.

    python -m benchmarks.budgets RECIPE --model FOLDER [--latency 0.5] [--batch_sizes 1 32]
        [--units heads neurons] [--max_metric_drop 0.01] [--only latency|drop] [--key value …]

The recipe tells the data and the metric, its training examples calibrate. Latency tables are
measured anew; the cut model is timed against the whole one, their calls in turn; seconds are those
of table, search and check, without the scoring that all batch sizes share. The evaluation examples
are drawn into two halves: `evaluate` sees the first, the promise is checked on the second.
"""

import argparse
import copy
import logging
import os
import tempfile
import time
from dataclasses import replace

import torch
from transformers import PreTrainedModel

import hfslim
from benchmarks.workbenches import opened
from hfslim.anatomy.structure import KINDS, Kind
from hfslim.measuring.measurement import macs
from hfslim.measuring.timing import paired_latency
from hfslim.pipeline.task_examples import TaskExamples
from hfslim.pruning.scores.batches import Batches
from hfslim.pruning.scores.criteria import criteria_by_kind, usual_criterion
from hfslim.pruning.search.search import Search
from hfslim.pruning.steps import calibrate, cut_copy, decide
from hfslim.pruning.target import Target

CALLS = 60
"""Timed calls of each model at batch 1; a third of that at larger ones."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--model", required=True, help="folder or Hub id of the trained model")
    parser.add_argument("--latency", type=float, default=0.5)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--units", nargs="+", choices=KINDS, default=["heads", "neurons"])
    parser.add_argument("--max_metric_drop", type=float, default=0.01)
    parser.add_argument("--only", choices=("latency", "drop"))
    options, overrides = parser.parse_known_args()
    bench, whole = opened(options.recipe, options.model, overrides)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hfslim.pruning").setLevel(logging.INFO)
    print(f"{type(whole).__name__}, {torch.get_num_threads()} threads, {bench.evaluation.device}\n")
    if options.only != "drop":
        with tempfile.TemporaryDirectory() as folder:
            os.environ["HFSLIM_CACHE"] = folder
            latencies(bench, whole, options.units, options.latency, options.batch_sizes)
    if options.only != "latency":
        drop(bench, whole, options.units, options.max_metric_drop)


def latencies(
    bench: TaskExamples, whole: PreTrainedModel, kinds: list[Kind], asked: float, sizes: list[int]
) -> None:
    everything, target = hfslim.find_units(whole, "dimensions" in kinds), {"latency": asked}
    units, goal = everything.of(kinds), Target.parse(target, kinds)
    data = Batches(bench.calibration(whole, 512), 512)
    criteria = criteria_by_kind(usual_criterion(kinds, sites=everything), kinds)
    known = calibrate(whole, units, data, criteria, bench.seed, False)
    print("| batch | asked for | measured | off by | whole | tries | seconds |", bench.metric, "|")
    print("|---|---|---|---|---|---|---|---|")
    for size in sizes:
        inputs, start = bench.inputs(whole, size), time.perf_counter()
        search = Search.priced(whole, units, goal, inputs, progress=False)
        structure, tries = decide(search, known.scores)
        seconds = time.perf_counter() - start
        small = cut_copy(whole, structure, known)
        times = paired_latency(whole, small, inputs, calls=CALLS if size == 1 else CALLS // 3)
        ratio, interval = 1 / times.speedup, f"{1 / times.high:.3f}–{1 / times.low:.3f}"
        print(
            f"| {size} | {asked:g} | {ratio:.3f} ({interval}) | {ratio / asked - 1:+.1%} | "
            f"{times.before.p50_ms:.1f} ms | {len(tries)} | {seconds:.0f} | "
            f"{bench.predict(small).value:.4f} |",
            flush=True,
        )


def drop(bench: TaskExamples, whole: PreTrainedModel, kinds: list[Kind], allowed: float) -> None:
    mixed = bench.eval.shuffle(seed=bench.seed)
    middle = len(mixed) // 2
    seen = replace(bench, eval=mixed.select(range(middle)))
    unseen = replace(bench, eval=mixed.select(range(middle, len(mixed))))
    small, inputs = copy.deepcopy(whole), bench.inputs(whole)
    result = hfslim.prune_within(
        small,
        bench.calibration(whole, 512),
        allowed,
        lambda model: seen.predict(model).value,
        units=kinds,
        inputs=inputs,
        progress=False,
    )
    kept = macs(small, inputs) / macs(whole, inputs)
    print(f"\nmax_metric_drop={allowed:g}: keeps {kept:.3f} of the macs, {result.structure}\n")
    print(f"| examples | whole {bench.metric} | cut | drop |\n|---|---|---|---|")
    for name, part in (("seen by evaluate", seen), ("not seen", unseen)):
        before, after = (part.predict(model).value for model in (whole, small))
        print(f"| {len(part.eval):,} {name} | {before:.4f} | {after:.4f} | {before - after:+.4f} |")


if __name__ == "__main__":
    main()
