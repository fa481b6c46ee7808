"""What is left of a model's quality when single weights are zero, before and after recovery.

    python -m benchmarks.weight_sparsity RECIPE --model FOLDER [--goals 2:4 0.5] [--recovery 60]
        [--methods magnitude wanda sparsegpt] [--max_examples 512] [--key value …]

The recipe tells the data and the metric; its training examples calibrate and recover, its
evaluation examples judge. Recovery trains on the labels for so many steps, with the zeros held.
Further keys override the recipe, as in `--data.max_eval_samples 1000`.
"""

import argparse
import copy
import sys
import tempfile
import time
from contextlib import redirect_stdout

import torch
from transformers import TrainingArguments

from benchmarks.workbenches import opened
from hfslim import SlimTrainer, WeightPruningCallback, sparsify, weight_sparsity
from hfslim.pipeline.task_examples import uses_cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--model", required=True, help="folder or Hub id of the trained model")
    parser.add_argument("--goals", nargs="+", default=["2:4", "0.5"], help="patterns, fractions")
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--max_examples", type=int, default=512)
    parser.add_argument("--recovery", type=int, default=60, help="steps; none if 0")
    options, overrides = parser.parse_known_args()
    bench, teacher = opened(options.recipe, options.model, overrides)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=uses_cpu(),
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=not bench.task.lazy,
            per_device_train_batch_size=32,
            train_sampling_strategy="group_by_length",
            max_steps=options.recovery,
            learning_rate=1e-4,
            logging_strategy="no",
            save_strategy="no",
            seed=bench.seed,
        )
        data = list(bench.calibration(teacher, options.max_examples))
        before = bench.evaluate(teacher).metrics[bench.metric]
        print(
            f"{torch.get_num_threads()} threads, {len(bench.eval):,} evaluation examples,", end=" "
        )
        print(f"{len(bench.train):,} to recover on; dense: {bench.metric} {before:.4f}")
        print(f"| goal | method | {bench.metric} | seconds | after {options.recovery} steps |")
        print("|---|---|---|---|---|")
        for goal in options.goals:
            asked = {"pattern": goal} if ":" in goal else {"sparsity": float(goal)}
            for method in options.methods:
                model, start = copy.deepcopy(teacher), time.perf_counter()
                rows = sparsify(model, data, **asked, method=method, progress=False).sparsity
                seconds = time.perf_counter() - start
                after = bench.evaluate(model).metrics[bench.metric]
                row = [goal, method, f"{after:.4f}", f"{seconds:.1f}", "–"]
                if options.recovery:
                    parts, held = bench.trainer_parts(), WeightPruningCallback()
                    trainer = SlimTrainer(model=model, args=arguments, callbacks=[held], **parts)
                    with redirect_stdout(sys.stderr):  # where the Trainer tells its own figures
                        trainer.train()
                    assert weight_sparsity(model) == rows, "a zero was lost"
                    row[-1] = f"{bench.evaluate(model).metrics[bench.metric]:.4f}"
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
