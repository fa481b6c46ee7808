"""One process or several: the same structure, the same losses, the same weights."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import one_answer
from distributed.launch import launch, launched
from places import SUPPORT


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return one_answer.run(tmp_path_factory.mktemp("alone"))


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_criterion_gives_one_answer_on_any_number_of_processes(
    processes: int, alone: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT), prepend=":")
    launch(Path(one_answer.__file__), tmp_path, processes=processes)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    assert len(alone) == 20
    for name, expected in alone.items():
        for rank in ranks:
            found = rank[name]
            assert found["structure"] == expected["structure"], name
            assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5), name
            assert found["weights"].keys() == expected["weights"].keys()
            for key, value in expected["weights"].items():
                difference = (found["weights"][key] - value).abs()
                assert (difference <= 1e-5).all(), (name, key)
    trained = [found["losses"] for name, found in alone.items() if name.endswith("training")]
    assert all(len(losses) == 8 * 4 + 2 for losses in trained)


@pytest.mark.distributed
def test_ranks_that_disagree_all_stop_with_the_structure_of_each(monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT), prepend=":")
    done = launched(Path(__file__).with_name("disagree.py"), processes=2)
    assert done.returncode != 0
    for rank in (0, 1):
        assert re.search(
            rf"rank {rank}: the ranks chose different structures "
            r"\(rank 0 [0-9a-f]{16}, rank 1 [0-9a-f]{16}\), so their weights or scores",
            done.stderr,
        ), done.stderr[-3000:]
