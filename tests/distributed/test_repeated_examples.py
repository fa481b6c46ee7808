"""A stream that every process reads whole: its repeated examples count nowhere."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard
from distributed.launch import launch
from torch.utils.data import DataLoader

from hfslim.training.batch_shares import count_stream

sys.path.insert(0, str(Path(__file__).parent))
from repeated_examples import Sized, Stream, outcome

SCRIPT = Path(__file__).parent / "repeated_examples.py"


@pytest.mark.distributed
def test_two_processes_train_and_evaluate_as_one(tmp_path: Path) -> None:
    """The last of the two steps holds 3 or 5 of 8 examples."""
    launch(SCRIPT, tmp_path / "two", "4", "11", "13", processes=2)
    results = [torch.load(f"{tmp_path}/two.{rank}", weights_only=True) for rank in (0, 1)]
    for kind, count in ((kind, count) for kind in (Stream, Sized) for count in (11, 13)):
        whole = outcome(str(tmp_path), kind, 8, count)
        for parts in (one[kind.__name__, count] for one in results):
            assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-5)
            torch.testing.assert_close(parts["gradient"], whole["gradient"], rtol=1e-4, atol=1e-7)
            assert parts["accuracy"] == pytest.approx(whole["accuracy"])


def test_workers_of_such_a_stream_are_refused() -> None:
    """Each would repeat examples of its own, in batches before the last step."""
    Accelerator(cpu=True)
    shard = IterableDatasetShard(Stream([1, 2, 3]), 2, num_processes=2)
    with pytest.raises(ValueError, match="dataloader_num_workers=1: each worker would repeat"):
        count_stream(DataLoader(shard, batch_size=2, num_workers=1))
