"""Throughput by number of processes, and what gates, capture and scores add to a step.

    python -m benchmarks.scaling [--processes 1 2] [--batch 16] [--steps 10]

Each number of processes is a launch of its own under torchrun (gloo, one thread a process), with
`batch / processes` texts of 32 tokens on each. In each round the variants run in turn, from another
one on each time, and the median of their ratios to the plain step of the same round is told.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

VARIANTS = ("plain", "gates", "gates and scores", "capture")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", type=int, default=16, help="of all processes together")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.batch, options.steps)
        return
    print(f"| processes | examples a second | {' | '.join(VARIANTS[1:])} | adding up scores |")
    print("|---|---|---|---|---|---|")
    for processes in options.processes:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes), "-m", "benchmarks.scaling", "--worker"]
        command += ["--batch", str(options.batch), "--steps", str(options.steps)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, check=True
        )
        row = json.loads(done.stdout.splitlines()[-1])
        ratios = " | ".join(f"{row[name]:.3f}" for name in VARIANTS[1:])
        print(
            f"| {processes} | {row['rate']:.1f} | {ratios} | {row['reduce']:.1f} ms |", flush=True
        )


def worker(batch: int, steps: int) -> None:
    """Time the variants of a step on this process; the first one prints."""
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoModelForSequenceClassification, BertConfig

    import hfslim
    from hfslim.distillation.losses.capture import Capture
    from hfslim.pruning.gates.gates import Gates
    from hfslim.pruning.scores.collector import Collector

    torch.distributed.init_process_group("gloo")
    processes = torch.distributed.get_world_size()
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536
    )
    model = AutoModelForSequenceClassification.from_config(config)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    inputs: dict[str, Any] = {
        "input_ids": torch.randint(1000, (batch // processes, 32)),
        "labels": torch.randint(2, (batch // processes,)),
    }
    units = hfslim.find_units(model).of(("heads", "neurons"))
    gates, capture = (
        Gates(model, units),
        Capture(model, hidden=True, attentions=False, vectors=False),
    )
    half = {s.path: (range(0, s.size, 2), s.size) for s in units if s.kind == "neurons"}
    gates.set(hfslim.Structure.of({"neurons": half}))
    collector = Collector(gates, {"heads": "fisher", "neurons": "fisher"}, mean_loss=True)

    def step(name: str) -> float:
        torch.distributed.barrier()
        start = time.perf_counter()
        if name == "gates and scores":
            collector.start()
        with gates if "gates" in name else nullcontext():
            with capture.recording() if name == "capture" else nullcontext():
                loss = wrapped(**inputs).loss
            loss.backward()
        collector.stop()
        optimizer.step()
        optimizer.zero_grad()
        torch.distributed.barrier()
        return time.perf_counter() - start

    rounds = []
    for number in range(steps + 1):
        order = [VARIANTS[(number + i) % len(VARIANTS)] for i in range(len(VARIANTS))]
        rounds.append({name: step(name) for name in order})
    rounds = rounds[1:]
    row = {
        name: statistics.median(one[name] / one["plain"] for one in rounds) for name in VARIANTS[1:]
    }
    row["rate"] = batch / statistics.median(one["plain"] for one in rounds)
    row["reduce"] = 1000 * statistics.median(timed(collector.scores.reduce) for _ in range(steps))
    if torch.distributed.get_rank() == 0:
        print(json.dumps(row))
    torch.distributed.destroy_process_group()


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
