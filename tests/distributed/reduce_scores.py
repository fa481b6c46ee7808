"""Score a share of one batch on each process, and write the scores of all."""

import sys
from pathlib import Path

import torch
from models import tiny

from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.pruning import importance_by_class
from hfslim.pruning.scores.batches import Batches
from hfslim.pruning.scores.criteria import CRITERIA, criteria_by_kind
from hfslim.pruning.steps import calibrate

CALIBRATED = [name for name, entry in CRITERIA.items() if "calibration" in entry.when]


def shared(share: slice) -> tuple:
    model = tiny("bert")
    batch = example_inputs(model, batch_size=7, length=8) | {"labels": torch.arange(7) % 3}
    return model, [{name: value[share] for name, value in batch.items()}]


def scores_of(share: slice, criterion: str) -> dict:
    model, data = shared(share)
    found = find_units(model)
    kinds = [kind for kind in CRITERIA[criterion].kinds if any(s.kind == kind for s in found)]
    criteria = criteria_by_kind(criterion, kinds)
    units = found.of(kinds)
    return calibrate(model, units, Batches(data, 7), criteria, progress=False).scores


def by_class(share: slice) -> dict:
    parts = importance_by_class(*shared(share), criterion="taylor", progress=False)
    return {**parts.by_class, "examples": parts.examples}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    # Shares of unequal size: the mean must weigh examples, not ranks.
    share = (slice(0, 5), slice(5, 7))[rank]
    scores = {name: scores_of(share, name) for name in CALIBRATED}
    scores["by class"] = by_class(share)
    torch.save(scores, Path(sys.argv[1]) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
