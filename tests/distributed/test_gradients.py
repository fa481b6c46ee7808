import sys
from pathlib import Path

import pytest
import torch
from distributed.launch import launch

sys.path.insert(0, str(Path(__file__).parent))
from gradients import HEADS, gradient

SCRIPT = Path(__file__).parent / "gradients.py"
CASES = [(head, distil) for head in HEADS for distil in (False, True)]
Result = tuple[torch.Tensor, dict[str, float]]


def terms(logged: dict[str, float], distil: bool) -> list[float]:
    names = sorted(name for name in logged if name.startswith("loss"))
    assert ("loss_distillation" in names) == distil
    return [logged[name] for name in names]


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple, Result]]:
    """Run every case with two processes and 8 examples in each."""
    target = tmp_path_factory.mktemp("gradients") / "two"
    launch(SCRIPT, target, "8", "1", processes=2)
    return [torch.load(f"{target}.{rank}", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize(("head", "distil"), CASES)
def test_four_accumulated_batches_equal_one(head: str, distil: bool, tmp_path: Path) -> None:
    whole, logged = gradient(head, distil, 16, 1, str(tmp_path))
    parts, logged_parts = gradient(head, distil, 4, 4, str(tmp_path))
    assert whole.norm() > 1e-3
    assert relative(parts, whole) < 1e-5
    assert terms(logged_parts, distil) == pytest.approx(terms(logged, distil), rel=1e-5)


@pytest.mark.parametrize("distil", [False, True])
def test_a_ragged_last_batch_counts_by_its_examples(distil: bool, tmp_path: Path) -> None:
    whole, _ = gradient("bert-single", distil, 14, 1, str(tmp_path), count=14)
    parts, _ = gradient("bert-single", distil, 4, 4, str(tmp_path), count=14)
    assert relative(parts, whole) < 1e-5


@pytest.mark.distributed
@pytest.mark.parametrize(("head", "distil"), CASES)
def test_two_processes_equal_one(
    head: str, distil: bool, two_processes: list[dict[tuple, Result]], tmp_path: Path
) -> None:
    whole, logged = gradient(head, distil, 16, 1, str(tmp_path))
    for results in two_processes:
        parts, logged_parts = results[head, distil]
        assert relative(parts, whole) < 1e-5
        assert terms(logged_parts, distil) == pytest.approx(terms(logged, distil), rel=1e-5)
