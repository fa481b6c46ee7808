"""Prune two models that should be one: rank 1 has loaded other weights."""

import sys

import torch
from models import tiny

import hfslim
from hfslim.anatomy.inputs import example_inputs

if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = tiny("bert", seed=rank)
    data = [example_inputs(model, batch_size=4, length=8)]
    try:
        hfslim.prune(model, data, {"macs": 0.5}, criterion="magnitude", progress=False)
    except RuntimeError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        # The launcher ends the other process as soon as one has ended.
        torch.distributed.barrier()
        sys.exit(3)
