"""Prune with a share of the calibration data on each process, and write each one's model."""

import sys
from pathlib import Path

import torch
import zoo
from models import tiny

import hfslim
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.structure import Kind

UNITS: dict[str, tuple[Kind, ...]] = {"bert": ("heads", "neurons"), "resnet": ("channels",)}


def pruned(family: str, share: slice) -> dict:
    model = tiny("bert") if family == "bert" else zoo.tiny("image/resnet")
    batch = example_inputs(model, batch_size=24, length=8)
    data = [{name: value[share] for name, value in batch.items()}]
    result = hfslim.prune(model, data, {"parameters": 0.6}, UNITS[family], progress=False)
    return {"structure": result.structure.to_dict(), "weights": dict(model.named_parameters())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    share = (slice(0, 17), slice(17, 24))[rank]
    for family in UNITS:
        torch.save(pruned(family, share), Path(sys.argv[1]) / f"{family}{rank}.pt")
    torch.distributed.destroy_process_group()
