"""DeepSpeed's ZeRO on two CPU processes: `make test-deepspeed`."""

from pathlib import Path

import pytest
import torch
from distributed import zero
from distributed.launch import launch
from transformers import AutoModelForSequenceClassification

pytestmark = [pytest.mark.deepspeed, pytest.mark.distributed]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=":")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def equal(one: Path, other: Path) -> None:
    load = AutoModelForSequenceClassification.from_pretrained
    expected, found = load(one).state_dict(), load(other).state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)


def test_zero2_prunes_in_training_like_one_process(tmp_path: Path) -> None:
    zero.train(tmp_path / "one", 0, prunes=True)
    launch(Path(zero.__file__), tmp_path / "two", "2", processes=2)
    equal(tmp_path / "one" / "saved", tmp_path / "two" / "saved")


def test_zero3_distils_like_one_process_and_its_model_is_cut_after(tmp_path: Path) -> None:
    zero.train(tmp_path / "one", 0, prunes=False)
    launch(Path(zero.__file__), tmp_path / "two", "3", processes=2)
    equal(tmp_path / "one" / "saved", tmp_path / "two" / "saved")
    for name in ("one", "two"):
        zero.cut(tmp_path / name)
    equal(tmp_path / "one" / "cut", tmp_path / "two" / "cut")
    refused = (tmp_path / "two" / "refused.txt").read_text()
    assert "was built in the parts of ZeRO-3" in refused and "zero3_init_flag: false" in refused
