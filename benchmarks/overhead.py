"""What hfslim adds to a training step, to a start, and how long scoring and search take.

    python benchmarks/overhead.py [--model FOLDER_OR_HUB_ID]

Every comparison is paired: the two sides run in turn, and the median of the ratios is told. Without
a model, a BERT of MiniLM-L6's size with random weights stands in, which costs the same.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time

import torch
from transformers import AutoModelForSequenceClassification, BertConfig

import hfslim
from hfslim.prune.collect import Collector
from hfslim.prune.gates import Gates

UNITS = ("heads", "neurons")
MINILM = {
    "num_hidden_layers": 6,
    "hidden_size": 384,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "num_labels": 3,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="classifier to use; random weights if not given")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    load = AutoModelForSequenceClassification
    model = (
        load.from_pretrained(options.model)
        if options.model
        else load.from_config(BertConfig(**MINILM))
    )
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    print(f"import hfslim / import transformers: {import_ratio(options.rounds // 3):.3f}")
    ratio, spread = step_ratio(model, options.rounds)
    print(f"training step with gates / without, batch 32 × 64 tokens: {ratio:.3f} ({spread})")
    print(f"scoring and search, 512 texts of 64 tokens: {scoring_seconds(model):.1f} s")


def import_ratio(rounds: int) -> float:
    return statistics.median(
        _import_seconds("hfslim, transformers") / _import_seconds("transformers")
        for _ in range(max(rounds, 3))
    )


def _import_seconds(modules: str) -> float:
    code = f"import time; t = time.perf_counter(); import {modules}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def step_ratio(model: torch.nn.Module, rounds: int) -> tuple[float, str]:
    """Time a step without gates and one with gates half closed that score, in turn."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    batch = {
        "input_ids": torch.randint(1000, (32, 64)),
        "attention_mask": torch.ones(32, 64, dtype=torch.long),
        "labels": torch.randint(2, (32,)),
    }

    def step() -> float:
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    units = hfslim.find_units(model).of(UNITS)
    half = {s.path: (range(0, s.size, 2), s.size) for s in units if s.kind == "neurons"}
    gates = Gates(model, units)
    gates.set(hfslim.Structure.of({"neurons": half}))
    collector = Collector(gates, dict.fromkeys(UNITS, "fisher"), mean_loss=True)
    collector.start()
    for _ in range(3):
        step()
    ratios = []
    for number in range(rounds):
        # The order alternates, so that a drift of the machine's speed cancels.
        plain = step() if number % 2 else None
        with gates:
            gated = step()
        ratios.append(gated / (step() if plain is None else plain))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, f"quartiles {low:.3f}–{high:.3f}"


def scoring_seconds(model: torch.nn.Module) -> float:
    data = [
        {
            "input_ids": torch.randint(1000, (32, 64)),
            "attention_mask": torch.ones(32, 64, dtype=torch.long),
            "labels": torch.randint(2, (32,)),
        }
        for _ in range(16)
    ]
    start = time.perf_counter()
    hfslim.prune(model, data, target={"macs": 0.5}, units=UNITS, progress=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
