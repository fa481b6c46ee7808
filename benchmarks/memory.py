"""Peak host memory of scoring and cutting a classifier, against the size of the model.

    python -m benchmarks.memory [--sizes tiny small medium large huge] [--criterion fisher obs]

Each line is a process of its own: a BERT with random weights, built from its config, is scored on
8 texts of 32 tokens, cut to half of its multiply-accumulates and saved. The peak is of resident
memory until it is cut, less what was there before the model; what is left after that, and the peak
of saving, are told likewise. Linux only.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time

from benchmarks.peak import Peak

SIZES = {
    "tiny": (256, 4),
    "small": (512, 8),
    "medium": (768, 12),
    "large": (1024, 24),
    "huge": (2048, 20),
}
"""Width and layers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small", "medium"])
    parser.add_argument("--criterion", nargs="+", default=["fisher"])
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "CRITERION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(*options.one)))
        return
    print(f"{platform.processor() or platform.machine()}, one process for each line\n")
    columns = ("criterion", "parameters", "model", "peak, scored and cut", "peak / model")
    print("|", " | ".join((*columns, "left", "peak, saving", "seconds")), "|")
    print("|" + 8 * "---|")
    for criterion in options.criterion:
        for size in options.sizes:
            command = [sys.executable, "-m", "benchmarks.memory", "--one", size, criterion]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            names = ("model", "peak", "left", "saving")
            model, peak, left, saving = (f"{row[name] / 2**20:,.0f} MiB" for name in names)
            print(
                f"| {criterion} | {row['parameters'] / 1e6:,.0f} M | {model} | {peak} | "
                f"{row['peak'] / row['model']:.2f} | {left} | {saving} | {row['seconds']:.0f} |",
                flush=True,
            )


def measured(size: str, criterion: str) -> dict[str, float]:
    """Score, cut and save a model of a size; return bytes above those before it was built."""
    import torch
    from transformers import AutoModelForSequenceClassification, BertConfig

    import hfslim
    from hfslim.anatomy.inputs import example_inputs

    width, layers = SIZES[size]

    def build(width: int, layers: int) -> torch.nn.Module:
        config = BertConfig(
            vocab_size=1000,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            num_labels=3,
        )
        return AutoModelForSequenceClassification.from_config(config).eval()

    def prune(model: torch.nn.Module) -> None:
        batches = [
            {**example_inputs(model, 2, seed, 32), "labels": torch.arange(2)} for seed in range(4)
        ]
        reconstruction = "weights" if criterion == "obs" else "none"
        hfslim.prune(
            model,
            batches,
            {"macs": 0.5},
            criterion=criterion,
            progress=False,
            reconstruction=reconstruction,
        )

    prune(build(128, 1))  # What is loaded on first use is no part of the model's share.
    memory = Peak()
    if not memory.known:
        raise SystemExit("the peak of this process's memory is only told on Linux")
    model = build(width, layers)
    parameters = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    prune(model)
    seconds = time.perf_counter() - start
    peak, left = memory.growth(), memory.now()
    with tempfile.TemporaryDirectory() as folder:
        saving = Peak()
        model.save_pretrained(folder)
        peak_of_saving = left + saving.growth()
    return {
        "parameters": parameters,
        "model": 4 * parameters,
        "peak": peak,
        "left": left,
        "saving": peak_of_saving,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
