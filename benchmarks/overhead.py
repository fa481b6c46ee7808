"""What hfslim adds to a training step, to a start, and what scoring and search take.

    python -m benchmarks.overhead [--model FOLDER_OR_HUB_ID] [--rounds 30]
        [--output benchmarks/results/overhead.json]

Every comparison is paired: the two sides run in turn, and the median of the ratios is told. Without
a model, a BERT of MiniLM-L6's size with random weights stands in, which costs the same. Results are
added to the file, one column for each number of threads.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, BertConfig

import hfslim
from benchmarks.markdown import Row, circumstances, table
from benchmarks.peak import Peak
from benchmarks.rivals.results import Results
from hfslim.pruning.gates.gates import Gates
from hfslim.pruning.scores.collector import Collector

NAME = "overhead"
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
    parser.add_argument("--output", type=Path, default=Path(f"benchmarks/results/{NAME}.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    load = AutoModelForSequenceClassification
    model = (
        load.from_pretrained(options.model)
        if options.model
        else load.from_config(BertConfig(**MINILM))
    )
    results = Results(options.output)
    run = results.begin({"name": NAME, "model": type(model).__name__})
    threads = torch.get_num_threads()
    cell = {"method": f"{threads} thread{'s' if threads > 1 else ''}", "seed": 0, "run": run}
    cell |= {"import": import_ratio(max(options.rounds // 3, 3))}
    cell |= {"step": step_ratio(model, options.rounds)}
    results.add("cells", cell | {"prune": pruning(model)})
    print(render(results.read()))


def render(data: Row) -> str:
    """Return the Markdown of the results: a column for each number of threads."""
    cells = sorted(data["cells"], key=lambda cell: cell["method"])

    def ratio(one: Row) -> str:
        return f"{one['ratio']:.3f} (quartiles {one['low']:.3f}–{one['high']:.3f})"

    def memory(cell: Row, name: str) -> str:
        taken = cell[name]["bytes"]
        return "–" if taken is None else f"{taken / 2**20:,.0f} MiB"

    rows = [
        [
            "`import hfslim` with transformers / `import transformers`",
            *(f"{ratio(c['import'])}, of {c['import']['seconds']:.1f} s" for c in cells),
        ],
        [
            "a training step with gates half closed and scoring / without, batch 32 × 64 tokens",
            *(f"{ratio(c['step'])}, of {c['step']['seconds']:.2f} s" for c in cells),
        ],
        ["the same step's peak of memory above the model's", *(memory(c, "step") for c in cells)],
        [
            "scoring, search and cut to half, 512 texts of 64 tokens",
            *(f"{c['prune']['seconds']:.1f} s" for c in cells),
        ],
        ["its peak of memory above the model's", *(memory(c, "prune") for c in cells)],
    ]
    head = ["what", *(cell["method"] for cell in cells)]
    return f"{table(head, rows)}\n`{data['model']}`; {circumstances(data)}\n"


def _quartiles(ratios: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": middle, "low": low, "high": high}


def import_ratio(rounds: int) -> dict[str, Any]:
    """Start an interpreter with and without hfslim, in turn."""
    pairs = [
        (_import_seconds("hfslim, transformers"), _import_seconds("transformers"))
        for _ in range(rounds)
    ]
    seconds = statistics.median(plain for _, plain in pairs)
    return {**_quartiles([ours / plain for ours, plain in pairs]), "seconds": seconds}


def _import_seconds(modules: str) -> float:
    code = f"import time; t = time.perf_counter(); import {modules}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def step_ratio(model: torch.nn.Module, rounds: int) -> dict[str, Any]:
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
    memory = Peak()
    with gates:
        step()
    taken = memory.growth()
    ratios, seconds = [], []
    for number in range(rounds):
        # The order alternates, so that a drift of the machine's speed cancels.
        plain = step() if number % 2 else None
        with gates:
            gated = step()
        seconds.append(step() if plain is None else plain)
        ratios.append(gated / seconds[-1])
    return {**_quartiles(ratios), "seconds": statistics.median(seconds), "bytes": taken}


def pruning(model: torch.nn.Module) -> dict[str, Any]:
    data = [
        {
            "input_ids": torch.randint(1000, (32, 64)),
            "attention_mask": torch.ones(32, 64, dtype=torch.long),
            "labels": torch.randint(2, (32,)),
        }
        for _ in range(16)
    ]
    start, memory = time.perf_counter(), Peak()
    hfslim.prune(model, data, target={"macs": 0.5}, units=UNITS, progress=False)
    return {"seconds": time.perf_counter() - start, "bytes": memory.growth()}


if __name__ == "__main__":
    main()
