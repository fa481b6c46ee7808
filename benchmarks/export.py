"""What is left of a cut's gain in exported files, and what int8 changes on real examples.

    python -m benchmarks.export make RECIPE --model FOLDER --output FOLDER [--budget 0.5]
        [--max_examples 512] [--key value …]
    python -m benchmarks.export time FOLDER [--batch_sizes 1 32] [--calls 30]

`make` cuts the model by `hfslim.prune` to a share of its multiply-accumulates, without training,
exports the whole and the cut one in each format, and lets each file judge the evaluation examples.
The recipe tells the data and the metric, its training examples calibrate; further keys override it,
as in `--data.max_eval_samples 1000`. `time` runs whole and cut file of each format in turn.
"""

import argparse
import copy
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

import hfslim
from hfslim.anatomy.inputs import example_inputs
from hfslim.hub.export import open_exported
from hfslim.measuring.measurement import macs
from hfslim.measuring.timing import call_seconds, evaluating, in_turn, paired, summarise
from hfslim.pipeline.opening import open_classifier
from hfslim.pipeline.recipe import load_recipe
from hfslim.pipeline.task_examples import Predictions, TaskExamples, uses_cpu
from hfslim.tasks import TASKS

MODELS = ("whole", "cut")
FORMATS: dict[str, dict[str, Any]] = {
    "onnx": {"format": "onnx"},
    "onnx-int8": {"format": "onnx", "int8": True},
    "torch-export": {"format": "torch-export"},
}
STATED = "stated.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    made = verbs.add_parser("make")
    made.add_argument("recipe")
    made.add_argument("--model", required=True, help="folder or Hub id of the trained model")
    made.add_argument("--budget", type=float, default=0.5)
    made.add_argument("--max_examples", type=int, default=512)
    made.add_argument("--output", type=Path, required=True)
    timed = verbs.add_parser("time")
    timed.add_argument("output", type=Path)
    timed.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    timed.add_argument("--calls", type=int, default=30)
    timed.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    options, overrides = parser.parse_known_args()
    logging.getLogger("hfslim").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print(f"{torch.get_num_threads()} threads", flush=True)
    if options.verb == "make":
        make(options, prepare(options.recipe, overrides, options.model))
    else:
        time(options)


def prepare(recipe_file: str, overrides: list[str], model: str) -> TaskExamples:
    recipe = load_recipe(recipe_file, overrides)
    arguments = TrainingArguments(
        use_cpu=uses_cpu(),
        report_to="none",
        remove_unused_columns=not TASKS[recipe.task].lazy,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
    )
    return TaskExamples.prepare(
        recipe.task, recipe.data, recipe.metric, recipe.seed, arguments, model
    )


def make(options: argparse.Namespace, bench: TaskExamples) -> None:
    output = options.output
    whole = bench.load_model(options.model).eval()
    cut, inputs = copy.deepcopy(whole), bench.inputs(whole)
    data = bench.calibration(whole, options.max_examples)
    hfslim.prune(cut, data, {"macs": options.budget}, inputs=inputs, progress=False)
    for name, model in zip(MODELS, (whole, cut), strict=True):
        shutil.rmtree(output / name, ignore_errors=True)
        model.save_pretrained(output / name / "torch")
    (output / STATED).write_text(json.dumps({"length": bench.stated_length}))
    expected = bench.predict(cut)
    print(f"{len(expected.logits):,} examples; greatest logit {abs(expected.logits).max():.2f}")
    print("| file | bytes, whole | bytes, cut | difference of a logit | metric | agreement |")
    print("|---|---|---|---|---|---|")
    print(f"| torch | – | – | – | {expected.value:.4f} | – |", flush=True)
    for format, how in FORMATS.items():
        sizes = [
            hfslim.export(
                model, output / name / format, processor=bench.processor, batch_sizes=(), **how
            ).bytes
            for name, model in zip(MODELS, (whole, cut), strict=True)
        ]
        found = bench.predict(open_exported(output / "cut" / format))
        print(f"| {format} | {sizes[0]:,} | {sizes[1]:,} | {told(expected, found)} |", flush=True)


def told(expected: Predictions, found: Predictions) -> str:
    difference = abs(found.logits - expected.logits).max()
    return f"{difference:.2g} | {found.value:.4f} | {expected.agreement(found):.2%}"


def time(options: argparse.Namespace) -> None:
    folder = options.output
    models = [open_classifier(str(folder / name / "torch"))[1] for name in MODELS]
    length = json.loads((folder / STATED).read_text())["length"]
    stated = {size: example_inputs(models[0], size, length=length) for size in options.batch_sizes}
    gain = macs(models[0], stated[options.batch_sizes[0]])
    gain /= macs(models[1], stated[options.batch_sizes[0]])
    print(f"multiply-accumulates: {gain:.3f} times fewer")
    print("| run by | batch | whole, p50 ms | cut, p50 ms | speedup | of the MACs' ratio |")
    print("|---|---|---|---|---|---|")
    for format in ("torch", *options.formats):
        runs: list[Any] = models
        if format != "torch":
            runs = [open_exported(folder / name / format) for name in MODELS]
        for size, inputs in stated.items():
            if format != "torch":
                inputs = inputs | added(folder / "cut" / format, inputs)
            clocks = [lambda run=run, given=inputs: call_seconds(run, given) for run in runs]
            with evaluating(*models):
                seconds = in_turn(clocks, options.calls, warmup=3)
            before, after = (summarise(one, size, "", "cpu") for one in seconds)
            pair = paired(*seconds, before, after)
            faster = f"{pair.speedup:.2f} ({pair.low:.2f}–{pair.high:.2f})"
            print(
                f"| {format} | {size} | {before.p50_ms:.2f} | {after.p50_ms:.2f} | {faster} | "
                f"{pair.speedup / gain:.2f} |",
                flush=True,
            )


def added(folder: Path, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return whatever else an exported file takes, as a tokenizer gives it for one text each."""
    axes = json.loads((folder / "export_report.json").read_text())["axes"]
    first = next(iter(inputs.values()))
    makes = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}
    missing = [name for name in axes if name not in inputs]
    return {name: makes[name](first, dtype=torch.long) for name in missing}


if __name__ == "__main__":
    main()
