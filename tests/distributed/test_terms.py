"""A batch, accumulated batches and processes: one gradient for each term that claims it."""

import sys
from pathlib import Path

import pytest
import torch
from distributed.launch import launch

sys.path.insert(0, str(Path(__file__).parent))
from terms import CASES, LAYOUT_MATTERS, gradient

from hfslim.distillation.losses import logit_losses
from hfslim.distillation.losses.feature_losses import FEATURE_LOSSES


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """Run every case on one batch."""
    folder = str(tmp_path_factory.mktemp("whole"))
    return {case: gradient(case, 16, 1, folder) for case in CASES}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple]]:
    """Run every case with two processes and 8 examples in each."""
    target = tmp_path_factory.mktemp("terms") / "two"
    launch(Path(__file__).parent / "terms.py", target, processes=2)
    return [torch.load(f"{target}.{rank}", weights_only=True) for rank in (0, 1)]


def check(case: str, ours: tuple, whole: tuple) -> None:
    (gradient, logged, pairs), (expected, whole_logged, whole_pairs) = ours, whole
    assert expected.norm() > 1e-3
    difference = ((gradient - expected).norm() / expected.norm()).item()
    if case in LAYOUT_MATTERS:
        assert difference > 1e-3
        return
    assert difference < 1e-5
    assert pairs == whole_pairs
    names = [name for name in logged if name.startswith("loss")]
    assert len(names) > 1
    for name in names:
        assert logged[name] == pytest.approx(whole_logged[name], rel=1e-5), name


@pytest.mark.parametrize("case", CASES)
def test_four_accumulated_batches_equal_one(
    case: str, whole: dict[str, tuple], tmp_path: Path
) -> None:
    check(case, gradient(case, 4, 4, str(tmp_path)), whole[case])


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(
    case: str, whole: dict[str, tuple], two_processes: list[dict[str, tuple]]
) -> None:
    for results in two_processes:
        check(case, results[case], whole[case])


def test_every_term_is_among_the_cases() -> None:
    assert set(logit_losses.LOGIT_LOSSES) | set(FEATURE_LOSSES) <= set(CASES)
    assert {
        n for n, loss in logit_losses.LOGIT_LOSSES.items() if loss.across_examples
    } == LAYOUT_MATTERS
    assert "not invariant" in logit_losses.correlation.__doc__


def test_a_map_of_the_second_step_is_not_the_first(whole: dict[str, tuple]) -> None:
    # Else the case of the dynamic map would prove nothing.
    assert whole["dynamic map"][2] != [(1, 2), (2, 5)]


def test_the_one_whose_layout_matters_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for accumulation, times in ((4, 1), (1, 0)):
        caplog.clear()
        gradient("dist", 16 // accumulation, accumulation, str(tmp_path))
        assert caplog.text.count("logit_loss='dist'") == times
