"""What pruning for some classes keeps of each class, right after the cut.

    python -m benchmarks.class_subsets RECIPE --model FOLDER --classes NAME NAME …
        --output FILE [--budgets 0.25 0.1] [--seeds 0 1 2] [--max_examples 512] [--key value …]

A seed orders the batches of the recipe's training examples, the first of which calibrate.
The model is cut to each budget of its multiply-accumulates three times, by examples of all classes,
of the classes named and of the others; `hfslim.prune` is told nothing else. It is judged on the
recipe's evaluation examples, among all classes. Cells that are in the file are not run again.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

import hfslim
from benchmarks.markdown import Row, circumstances, listed, percent, spread, table
from benchmarks.rivals.results import Results
from benchmarks.workbenches import opened
from hfslim.measuring.timing import evaluating
from hfslim.pruning.scores.batches import Batches

NAME = "classes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--model", required=True, help="folder or Hub id of the trained model")
    parser.add_argument("--classes", nargs="+", required=True, help="names of the classes to keep")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.25, 0.1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max_examples", type=int, default=512)
    options, overrides = parser.parse_known_args()
    bench, teacher = opened(options.recipe, options.model, overrides)
    names = list(bench.examples.labels.names)
    if unknown := set(options.classes) - set(names):
        parser.error(f"no classes {sorted(unknown)}: the data has {names}")
    # Images are processed whenever they are read: read them once.
    held = list(bench.batches(bench.eval, 256))
    pool = list(bench.calibration(teacher, len(bench.train)))
    truth = torch.cat([batch.pop("labels") for batch in held])

    def accuracies(model: PreTrainedModel) -> list[float]:
        with evaluating(model):
            said = torch.cat([model(**batch).logits.argmax(-1) for batch in held])
        right = (said == truth).double()
        return [right[truth == number].mean().item() for number in range(len(names))]

    results = Results(options.output)
    run = results.begin(
        {
            "name": NAME,
            "recipe": options.recipe,
            "classes": names,
            "chosen": options.classes,
            "examples": truth.bincount().tolist(),
            "calibration": options.max_examples,
            "teacher": accuracies(teacher),
        }
    )
    for seed in options.seeds:
        data = random.Random(seed).sample(pool, len(pool))
        for budget in options.budgets:
            for group, classes in groups(names, options.classes).items():
                key = {"method": group, "budget": budget, "seed": seed}
                if results.find("cells", **key):
                    continue
                result = hfslim.prune(
                    bench.load_model(options.model),
                    Batches(data, options.max_examples, classes),
                    target={"macs": budget},
                    progress=False,
                )
                cell = {**key, "run": run, "by_class": accuracies(result.model)}
                results.add("cells", cell)
                print(key, [percent(value) for value in cell["by_class"]], flush=True)


def groups(names: Sequence[str], chosen: Sequence[str]) -> dict[str, list[int]]:
    """Return the numbers of the classes of each group."""
    everything = range(len(names))
    return {
        "all classes": list(everything),
        "these": [number for number in everything if names[number] in chosen],
        "the others": [number for number in everything if names[number] not in chosen],
    }


def render(data: Row) -> str:
    """Return a table of the accuracy on each group of classes and on every class."""
    members = groups(data["classes"], data["chosen"])
    cells: dict[tuple[float, str], list[list[float]]] = {}
    for cell in data["cells"]:
        cells.setdefault((cell["budget"], cell["method"]), []).append(cell["by_class"])

    def row(budget: str, group: str, seeds: list[list[float]]) -> list[str]:
        means = [
            spread([statistics.fmean(one[number] for number in numbers) for one in seeds])
            for numbers in members.values()
        ]
        every = [percent(statistics.fmean(of)) for of in zip(*seeds, strict=True)]
        return [budget, group, *means, *every]

    order = sorted(cells, key=lambda key: (-key[0], list(members).index(key[1])))
    head = ["MACs kept", "pruned for", *members, *data["classes"]]
    rows = [row(f"{key[0]:g}", key[1], cells[key]) for key in order]
    return (
        f"*These* are {listed(data['chosen'])}.\n\n"
        + table(head, [row("1", "–", [data["teacher"]]), *rows])
        + f"\n`{data['recipe']}`; {sum(data['examples']):,} held-out examples, "
        f"{data['calibration']:,} to cut by; {circumstances(data)}\n"
    )


if __name__ == "__main__":
    main()
