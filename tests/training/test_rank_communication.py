"""Ranks add, share and compare values, with and without a process group."""

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from hfslim.training.ranks import (
    add_over_ranks,
    from_all_ranks,
    from_first_rank,
    rank,
    rank_count,
)


def test_a_process_without_a_group_is_the_only_rank() -> None:
    value = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert add_over_ranks(value) is value
    assert value.tolist() == [1.0, 2.0]
    assert (rank(), rank_count()) == (0, 1)
    assert from_first_rank(lambda: "only") == "only"
    assert from_all_ranks({"a": 1}) == [{"a": 1}]
    assert not distributed.is_initialized()


def _ranks(own: int, folder: str) -> None:
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=own, world_size=2)
    # Only float64 holds the sum.
    value = torch.tensor([2.0**53, own + 1.0], dtype=torch.float64) / 2
    total = add_over_ranks(value)
    shared = from_first_rank(lambda: f"of rank {rank()}")
    found = (total.tolist(), total is value, rank_count(), shared, from_all_ranks(own))
    torch.save(found, f"{folder}/{own}.pt")
    distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_without_a_launchers_variables_agree(tmp_path: Path) -> None:
    multiprocessing.spawn(_ranks, (str(tmp_path),), nprocs=2)
    for own in range(2):
        found = torch.load(tmp_path / f"{own}.pt")
        assert found == ([2.0**53, 1.5], True, 2, "of rank 0", [0, 1])
