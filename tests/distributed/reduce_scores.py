"""Score a share of one batch on each process, and write the scores of all."""

import sys
from pathlib import Path

import torch
from models import tiny

from hfslim.anatomy import example_inputs, find_units
from hfslim.prune.collect import collect, criteria_by_kind

KINDS = ("heads", "neurons", "layers")


def scores_of(share: slice) -> dict:
    model = tiny("bert")
    batch = example_inputs(model, batch_size=7, length=8) | {"labels": torch.arange(7) % 3}
    data = [{name: value[share] for name, value in batch.items()}]
    criteria = criteria_by_kind("fisher", KINDS)
    return collect(model, find_units(model), data, criteria, progress=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    # Shares of unequal size: the mean must weigh examples, not ranks.
    scores = scores_of((slice(0, 5), slice(5, 7))[rank])
    torch.save(scores, Path(sys.argv[1]) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
