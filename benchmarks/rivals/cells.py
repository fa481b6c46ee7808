"""One cell of a table: a method at a budget with a seed, before and after recovery."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel, set_seed

from benchmarks.peak import Peak
from benchmarks.rivals.data import Task
from benchmarks.rivals.methods import LABELS_ALONE, cut
from benchmarks.rivals.problem import score
from hfslim.distillation import DistillationConfig, DistillationTrainer
from hfslim.measuring.measurement import compare, count_parameters
from hfslim.pipeline.task_examples import uses_cpu

FINALISTS = 6
LATENCY_BATCHES = {1: 40, 32: 8}
"""Batch sizes at which latency is taken, with the number of calls."""


def describe_teacher(task: Task) -> dict[str, Any]:
    """Return what the models are compared with."""
    problem = task.problem(0)
    return {
        "parameters": count_parameters(task.teacher),
        "macs": problem.whole,
        **asdict(score(task.teacher, task.evaluation)),
    }


def choose_setting(
    task: Task, method: str, candidates: Iterable[str], budget: float, seed: int
) -> dict[str, Any]:
    """Try settings of a method and keep the one of highest accuracy on training examples.

    All are scored on a quarter of `task.selection`, and the best few on all of it.
    """
    problem, tried = task.problem(seed), []
    quarter = task.selection[::4]
    finalists: list[tuple[float, float, dict[str, Any], PreTrainedModel]] = []
    for name in candidates:
        row: dict[str, Any] = {"setting": name}
        tried.append(row)
        try:
            set_seed(seed)
            model = cut(problem, method, name, budget)
            first = score(model, quarter)
        except Exception as error:
            # A setting that does not run is out, and the file says so.
            row["error"] = f"{type(error).__name__}: {error}"
            continue
        row |= {"macs": problem.kept(model), "screening": asdict(first)}
        finalists.append((first.accuracy, -first.loss, row, model))
        finalists = sorted(finalists, key=lambda f: f[:2], reverse=True)[:FINALISTS]
    if not finalists:
        raise RuntimeError(f"no setting of {method} runs at {budget}: {tried}")
    for _, _, row, model in finalists:
        row |= asdict(score(model, task.selection))
    best = max((row for *_, row, _ in finalists), key=lambda r: (r["accuracy"], -r["loss"]))
    return {"setting": best["setting"], "tried": tried}


def run_cell(
    task: Task, method: str, setting: str, budget: float, seed: int, timed: bool
) -> dict[str, Any]:
    """Cut, score, recover and score again; with the latency beside the teacher's if `timed`."""
    problem = task.problem(seed)
    set_seed(seed)
    start, memory = time.perf_counter(), Peak()
    model = cut(problem, method, setting, budget)
    cell: dict[str, Any] = {
        "cut_seconds": time.perf_counter() - start,
        "cut_bytes": memory.growth(),
        "macs": problem.kept(model),
        "parameters": count_parameters(model) / count_parameters(task.teacher),
        "before": asdict(score(model, task.evaluation)),
    }
    start = time.perf_counter()
    recover(task, model, seed, method not in LABELS_ALONE)
    cell["recovery_seconds"] = time.perf_counter() - start
    cell["after"] = asdict(score(model, task.evaluation))
    if timed:
        cell["latency"] = [_latency(task, model, *pair) for pair in LATENCY_BATCHES.items()]
    return cell


def recover(task: Task, model: PreTrainedModel, seed: int, taught: bool = True) -> None:
    """Distil the teacher into a cut model, by the recipe's arguments, the same for every method.

    Where it is not `taught`, the loss by the labels is all there is.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = DistillationConfig(
            **{
                **task.arguments,
                **({} if taught else {"alpha": 0.0}),
                "output_dir": folder,
                "use_cpu": uses_cpu(),
                "seed": seed,
                "remove_unused_columns": False,
                "logging_strategy": "no",
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                # It was checked when its accuracy was written down.
                "allow_untrained_teacher": True,
            }
        )
        trainer = DistillationTrainer(
            model=model,
            args=arguments,
            teacher=task.remembered,
            train_dataset=[{**row, "row": index} for index, row in enumerate(task.train)],
            data_collator=task.collate,
        )
        with redirect_stdout(sys.stderr):  # where the Trainer tells its own figures
            trainer.train()
    model.eval()


def _latency(task: Task, model: PreTrainedModel, batch_size: int, calls: int) -> dict[str, Any]:
    inputs = task.inputs(batch_size)
    result = compare(task.teacher, model, inputs, calls=calls, warmup=2)
    return {
        "batch": batch_size,
        "teacher_ms": result.before.latency_ms,
        "ms": result.after.latency_ms,
        "speedup": result.speedup,
        "low": result.low,
        "high": result.high,
        "threads": result.after.latency.threads,
    }
