"""What is left of a model's quality right after `hfslim.prune`, without any training.

    python -m benchmarks.post_training RECIPE --model FOLDER [--budgets 0.75 0.5 0.25]
        [--criterion obs] [--reconstruction weights] [--max_examples 512] [--key value …]

The recipe tells the data and the metric, its training examples calibrate, its evaluation examples
judge; further keys override it, as in `--data.max_eval_samples 1000`. Units are scored once, each
budget of multiply-accumulates is cut from a copy. Seconds and CPU seconds are those of scoring,
search and cut, as if for that budget alone; reading data and judging is not in them.
"""

import argparse
import resource
import time

import torch

import hfslim
from benchmarks.workbenches import opened
from hfslim.anatomy.structure import KINDS
from hfslim.measuring.measurement import macs
from hfslim.pruning.obs.reconstruction import RECONSTRUCTIONS
from hfslim.pruning.scores.batches import Batches
from hfslim.pruning.scores.criteria import criteria_by_kind
from hfslim.pruning.search.search import Search
from hfslim.pruning.steps import calibrate, cut_copy, decide
from hfslim.pruning.target import Target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--model", required=True, help="folder or Hub id of the trained model")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--units", nargs="+", choices=KINDS, default=["heads", "neurons"])
    parser.add_argument("--criterion", default="obs")
    parser.add_argument("--reconstruction", choices=RECONSTRUCTIONS, default="weights")
    parser.add_argument("--max_examples", type=int, default=512)
    options, overrides = parser.parse_known_args()
    bench, teacher = opened(options.recipe, options.model, overrides)
    inputs = bench.inputs(teacher)
    units = hfslim.find_units(teacher).of(options.units)
    criteria = criteria_by_kind(options.criterion, options.units)
    batches = Batches(list(bench.calibration(teacher, options.max_examples)), options.max_examples)
    whole, before = macs(teacher, inputs), bench.predict(teacher).value
    start, memory = _clocks(), _peak()
    calibration = calibrate(
        teacher, units, batches, criteria, bench.seed, False, options.reconstruction
    )
    scoring = _clocks() - start
    print(f"{torch.get_num_threads()} threads, {len(bench.eval):,} evaluation examples")
    print(
        f"scored on {options.max_examples} examples in {scoring[0]:.1f} s; peak of memory", end=" "
    )
    print(f"{_peak() / 2**30:.2f} GiB, {memory / 2**30:.2f} GiB before")
    print(f"| MACs kept | {bench.metric} | of the model's {before:.4f} | seconds | CPU | kept |")
    print("|---|---|---|---|---|---|")
    for budget in options.budgets:
        start = _clocks()
        target = Target.parse({"macs": budget}, options.units)
        search = Search.priced(teacher, units, target, inputs)
        structure, _ = decide(search, calibration.scores)
        model = cut_copy(teacher, structure, calibration)
        seconds, cpu = scoring + _clocks() - start
        after = bench.predict(model).value
        print(
            f"| {macs(model, inputs) / whole:.3f} | {after:.4f} | {after / before:.1%} | "
            f"{seconds:.1f} | {cpu:.1f} | {structure} |",
            flush=True,
        )


def _clocks() -> torch.Tensor:
    """Return the seconds on the wall clock, and those of this process on all processors."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def _peak() -> int:
    """Return the most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
