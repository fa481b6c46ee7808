"""What a step of distillation costs beside its parts, in one run, call by call in turn.

    python -m benchmarks.distillation RECIPE --model FOLDER [--layers 3] [--batch_size 32]
        [--calls 40] [--key value …]

The model is the teacher; the student has evenly spaced layers of it. A step is a batch made of its
examples, forward, loss and backward, without the optimizer. The uncached step is compared with a
step of fine-tuning and a teacher's forward measured apart, the cached step with a step of
fine-tuning. Intervals of 95 % are a bootstrap over rounds.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import TrainingArguments

import hfslim
from benchmarks.workbenches import opened
from hfslim import DistillationConfig, DistillationTrainer, SlimTrainer
from hfslim.distillation.teacher.teacher import run_teacher
from hfslim.measuring.timing import in_turn
from hfslim.pruning import spaced_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--model", required=True, help="folder or Hub id of the trained model")
    parser.add_argument("--layers", type=int, default=3, help="layers of the student")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--calls", type=int, default=40)
    options, overrides = parser.parse_known_args()
    bench, teacher = opened(options.recipe, options.model, overrides)
    student = hfslim.shrink(copy.deepcopy(teacher), spaced_layers(teacher, keep=options.layers))
    parts = bench.trainer_parts()
    parts["train_dataset"] = parts["train_dataset"].select(range(16 * options.batch_size))
    rows = [parts["train_dataset"][i] for i in range(options.batch_size)]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "per_device_train_batch_size": options.batch_size,
            "max_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": not bench.task.lazy,
            "use_cpu": bench.evaluation.use_cpu,
        }
        plain = SlimTrainer(copy.deepcopy(student), TrainingArguments(**settings), **parts)
        trainers = {"fine-tuning": plain}
        for name, cache in (("uncached", None), ("cached", f"{folder}/cache")):
            arguments = DistillationConfig(**settings, teacher_cache=cache)
            trainers[name] = DistillationTrainer(
                copy.deepcopy(student), arguments, teacher=copy.deepcopy(teacher), **parts
            )
        for trainer in trainers.values():
            trainer.train()
            trainer.state.global_step, trainer.state.max_steps = 0, 1000
        clocks = {name: step(trainer, rows) for name, trainer in trainers.items()}
        clocks["teacher"] = forward(trainers["uncached"].teacher, plain, rows)
        times = dict(
            zip(clocks, in_turn(list(clocks.values()), options.calls, warmup=5), strict=True)
        )
    report(times, options)


def step(trainer: SlimTrainer | DistillationTrainer, rows: list) -> Callable[[], float]:
    """A clock of batch, forward, loss and backward."""
    counts = torch.full((2,), float(len(rows)), device=trainer.args.device)

    def run() -> float:
        trainer.model.zero_grad()
        began = time.perf_counter()
        trainer.training_step(trainer.model, trainer.data_collator(rows), counts)
        wait(trainer.args.device)
        return time.perf_counter() - began

    return run


def forward(teacher: torch.nn.Module, trainer: SlimTrainer, rows: list) -> Callable[[], float]:
    """A clock of a teacher's forward."""
    batch = trainer._prepare_inputs(trainer.data_collator(rows))

    def run() -> float:
        began = time.perf_counter()
        run_teacher(teacher, batch, None)
        wait(trainer.args.device)
        return time.perf_counter() - began

    return run


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def report(times: dict[str, np.ndarray], options: argparse.Namespace) -> None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    print(
        f"{device}, {torch.get_num_threads()} threads, batch {options.batch_size}, student of "
        f"{options.layers} layers; {options.calls} rounds"
    )
    for name, seconds in times.items():
        print(f"{name}: {1000 * np.median(seconds):.1f} ms")
    draws = np.random.default_rng(0).integers(0, options.calls, (2000, options.calls))
    middle = {name: np.median(seconds[draws], axis=1) for name, seconds in times.items()}
    middle |= {f"whole {name}": np.median(seconds) for name, seconds in times.items()}
    for name, other in (
        ("uncached", ("fine-tuning", "teacher")),
        ("cached", ("fine-tuning",)),
    ):
        ratio = middle[f"whole {name}"] / sum(middle[f"whole {one}"] for one in other)
        spread = middle[name] / sum(middle[one] for one in other)
        low, high = np.percentile(spread, [2.5, 97.5])
        print(f"{name} / ({' + '.join(other)}): {ratio:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
