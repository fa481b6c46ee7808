"""Gate, score and gather a model that torch's fully_shard has split between two processes.

Usage, under torchrun: sharded.py FOLDER; alone, `results` are those of the whole model.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from models import tiny
from structures import uneven
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from hfslim import find_units, shrink
from hfslim.anatomy.inputs import example_inputs
from hfslim.pruning.gates.gates import Gates
from hfslim.pruning.scores.collector import Collector

KINDS = ("heads", "neurons", "layers")


def results(shard: bool, rows: slice) -> dict[str, Any]:
    """Score the examples in `rows`, run them with gates closed, and gather the weights."""
    model = tiny("bert")
    structure, units = uneven(model), find_units(model).of(KINDS)
    inputs = {k: v[rows] for k, v in example_inputs(model, batch_size=6, length=8).items()}
    labels = (torch.arange(6) % 3)[rows]
    if shard:
        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
    gates = Gates(model, units)
    collector = Collector(gates, dict.fromkeys(KINDS, "fisher"))
    with gates:
        collector.start()
        logits = model(**inputs).logits
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        collector.stop()
        gates.set(structure)
        with torch.no_grad():
            closed = model(**inputs).logits
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options) if shard else model.state_dict()
    found = {"scores": collector.scores.reduce().mean(), "closed": closed}
    if weights:  # the first process has all of them
        whole = tiny("bert", seed=1)
        whole.load_state_dict(weights)
        shrink(whole, structure)
        with torch.no_grad():
            found["cut"] = whole(**inputs).logits
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found = results(True, (slice(0, 4), slice(4, 6))[rank])
    torch.save(found, Path(sys.argv[1]) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
