from pathlib import Path

import pytest
import torch
from distributed import fsdp2
from distributed.launch import launch
from places import SUPPORT

SLICE = ("bert", "resnet", "wav2vec2")
REST = tuple(case for case in fsdp2.CASES if case not in SLICE)


@pytest.mark.distributed
@pytest.mark.parametrize("cases", [SLICE, pytest.param(REST, marks=pytest.mark.slow)])
def test_fsdp2_shards_layers_and_ends_as_one_process_does(
    cases: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT), prepend=":")
    launch(Path(fsdp2.__file__), tmp_path / "two", *cases, processes=2)
    found = torch.load(tmp_path / "two" / "found.pt")
    for case in cases:
        one, two = fsdp2.train(case, tmp_path / "one" / case), found[case]
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4, abs=1e-4), case
        torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=1e-4)
        assert len(two["parts"]) > 2, case
        for part in two["parts"]:
            assert not any(other.startswith(f"{part}.") for other in two["parts"] if part), case
