"""What pruning after training takes, step by step: seconds, CPU seconds and memory.

    python -m benchmarks.scale [--size bert-base] [--examples 512] [--length 64] [--batch 32]

A model of that size with random weights, which costs what a trained one does, is scored by the
default criterion and cut to half of its multiply-accumulates. One plain forward and backward pass
over the same examples, by the loss, stands beside it. It runs on a GPU where there is one.
"""

import argparse
import platform
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import hfslim
from hfslim.anatomy.structure import Kind
from hfslim.pruning.obs.moments import SecondMoments
from hfslim.pruning.obs.reconstruction import obs_scores
from hfslim.pruning.scores.batches import Batches
from hfslim.pruning.search.search import Search
from hfslim.pruning.steps import Calibration, cut, decide
from hfslim.pruning.target import Target

LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
MINILM = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "minilm": ("bert", MINILM),
    "bert-base": ("bert", {}),
    "bert-large": ("bert", LARGE),
    "vit-base": ("vit", {}),
    "vit-large": ("vit", LARGE),
    "resnet-50": ("resnet", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="bert-base")
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(options.size).to(device).eval()
    data = examples(model, options.examples, options.length, options.batch)
    kinds: tuple[Kind, ...] = ("channels",) if "resnet" in options.size else ("heads", "neurons")
    units, target = hfslim.find_units(model).of(kinds), Target.parse({"macs": 0.5}, kinds)
    one = {k: v[:1] for k, v in data[0].items() if k != "labels"}

    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    shape = " × ".join(map(str, data[0][model.main_input_name].shape[1:]))
    print(f"{options.size} on {name}, {torch.get_num_threads()} threads", end=", ")
    print(f"{options.examples} examples of {shape}\n")
    print("| step | seconds | CPU seconds | peak of memory |\n|---|---|---|---|")
    watched("forward and backward pass, to compare", lambda: passes(model, data))
    moments = SecondMoments(units, data, progress=False)
    watched("second moments", lambda: moments.kept(model))
    scores = watched("order of elimination", lambda: obs_scores(model, moments))
    known = Calibration(units, scores, Batches(data, options.examples), moments, "weights")
    search = watched("costs of units", lambda: Search.priced(model, units, target, one))
    structure, _ = watched("search", lambda: decide(search, scores))
    watched("reconstruction and surgery", lambda: cut(model, structure, known))
    print(f"\nkeeps {structure}")


def build(size: str) -> PreTrainedModel:
    """Return a classifier of a size, with random weights."""
    family, fields = SIZES[size]
    config = AutoConfig.for_model(family, num_labels=3, **fields)
    text = family == "bert"
    auto = AutoModelForSequenceClassification if text else AutoModelForImageClassification
    return auto.from_config(config)


def examples(model: PreTrainedModel, number: int, length: int, batch: int) -> list[dict[str, Any]]:
    """Return batches of random inputs with labels."""
    made = []
    for start in range(0, number, batch):
        size = min(batch, number - start)
        stated = hfslim.anatomy.example_inputs(model, size, start, length)
        labels = torch.randint(3, (size,))
        made.append({k: v.to(model.device) for k, v in {**stated, "labels": labels}.items()})
    return made


def passes(model: PreTrainedModel, data: list[dict[str, Any]]) -> None:
    for batch in data:
        model(**batch).loss.backward()
        model.zero_grad()


def watched(name: str, step: Callable[[], Any]) -> Any:
    """Run a step and print what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"| {name} | {wall:.1f} | {cpu:.1f} | {peak / 2**30:.2f} GiB |", flush=True)
    return result


if __name__ == "__main__":
    main()
