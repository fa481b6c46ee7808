"""What of a cut's gain is left in exported files, and what int8 changes on real examples.

    python -m benchmarks.export RECIPE --model FOLDER [--budget 0.5] [--batch_sizes 1 32]
        [--calls 60] [--output outputs/export] [--key value …]

The recipe tells the data and the metric, its training examples calibrate, its evaluation examples
judge; further keys override it, as in `--data.max_eval_samples 1000`. The model is cut by
`hfslim.prune` to a share of its multiply-accumulates, without training. Both are exported; the two
files of a format run in turn, call by call.
"""

import argparse
import copy
import logging
import shutil
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

import hfslim
from hfslim.export import Export, open_exported
from hfslim.measure import compare, macs
from hfslim.recipe import load_recipe
from hfslim.tasks import TASKS
from hfslim.timing import PairedLatency, in_turn, paired, summarise, wall_seconds
from hfslim.workbench import Predictions, Workbench, agreement, uses_cpu

FORMATS = {
    "ONNX float32": {"format": "onnx"},
    "ONNX int8": {"format": "onnx", "int8": True},
    "torch.export": {"format": "torch-export"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--model", required=True, help="folder or Hub id of the trained model")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--calls", type=int, default=60)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--max_examples", type=int, default=512)
    parser.add_argument("--output", type=Path, default=Path("outputs/export"))
    options, overrides = parser.parse_known_args()
    logging.getLogger("hfslim").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    bench = prepare(options.recipe, overrides, options.model)
    whole = bench.load_model(options.model).eval()
    small = copy.deepcopy(whole)
    data = bench.calibration(whole, options.max_examples)
    inputs = bench.inputs(whole)
    hfslim.prune(small, data, {"macs": options.budget}, inputs=inputs, progress=False)
    gain = macs(whole, inputs) / macs(small.eval(), inputs)
    expected = bench.predict(small)
    print(f"{torch.get_num_threads()} threads; multiply-accumulates: {gain:.3f} times fewer")
    print(f"judged on {len(expected.logits):,} examples, {bench.metric} {expected.value:.4f}")
    speeds = [
        ("torch", size, timed_by_torch(bench, whole, small, size, options.calls))
        for size in options.batch_sizes
    ]
    print(
        "| file of the cut model | bytes | greatest difference of a logit, real examples |"
        f" greatest logit | {bench.metric} | agreement with torch |"
    )
    print("|---|---|---|---|---|---|")
    for name in options.formats:
        files = [
            export(model, options.output / kind / name.replace(" ", "_"), bench, name)
            for kind, model in (("whole", whole), ("cut", small))
        ]
        runs = [open_exported(file.folder) for file in files]
        print(f"| {name} | {files[1].bytes:,} | {told(expected, bench.predict(runs[1]))} |")
        speeds += [
            (name, size, timed(runs, stated(bench, small, files[1], size), options.calls))
            for size in options.batch_sizes
        ]
    print("\n| runtime | batch | whole, p50 ms | cut, p50 ms | speedup | of the MACs' ratio |")
    print("|---|---|---|---|---|---|")
    for name, size, pair in speeds:
        print(
            f"| {name} | {size} | {pair.before.p50_ms:.2f} | {pair.after.p50_ms:.2f} | "
            f"{pair.speedup:.2f} ({pair.low:.2f}–{pair.high:.2f}) | {pair.speedup / gain:.2f} |"
        )


def prepare(recipe_file: str, overrides: list[str], model: str) -> Workbench:
    recipe = load_recipe(recipe_file, overrides)
    arguments = TrainingArguments(
        use_cpu=uses_cpu(),
        report_to="none",
        remove_unused_columns=not TASKS[recipe.task].lazy,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
    )
    return Workbench.prepare(recipe.task, recipe.data, recipe.metric, recipe.seed, arguments, model)


def export(model: torch.nn.Module, folder: Path, bench: Workbench, name: str) -> Export:
    shutil.rmtree(folder, ignore_errors=True)
    how = {**FORMATS[name], "processor": bench.processor, "batch_sizes": ()}
    return hfslim.export(model, folder, **how)


def told(expected: Predictions, found: Predictions) -> str:
    difference = abs(found.logits - expected.logits).max()
    return (
        f"{difference:.2g} | {abs(expected.logits).max():.2f} | {found.value:.4f} | "
        f"{agreement(expected, found):.2%}"
    )


def stated(bench: Workbench, model, file: Export, size: int) -> dict[str, torch.Tensor]:
    """Return inputs of a stated size, with whatever else the file takes."""
    inputs = bench.inputs(model, size)
    first = next(iter(inputs.values()))
    missing = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}
    rest = {k: make(first, dtype=torch.long) for k, make in missing.items() if k in file.axes}
    return rest | inputs


def timed(runs: list, inputs: dict[str, torch.Tensor], calls: int) -> PairedLatency:
    clocks = [lambda run=run: wall_seconds(run, inputs) for run in runs]
    seconds = in_turn(clocks, calls, warmup=5)
    size = len(next(iter(inputs.values())))
    before, after = (summarise(one, size, "", "cpu") for one in seconds)
    return paired(*seconds, before, after)


def timed_by_torch(bench: Workbench, whole, small, size: int, calls: int) -> PairedLatency:
    costs = compare(whole, small, bench.inputs(small, size), calls=calls)
    return PairedLatency(
        costs.before.latency, costs.after.latency, costs.speedup, costs.low, costs.high
    )


if __name__ == "__main__":
    main()
