import json
from pathlib import Path

import pytest
import torch
from distributed.launch import launch, launched
from places import SUPPORT
from transformers import AutoModelForSequenceClassification

import hfslim

SCRIPT = Path(__file__).with_name("prune_in_stock_trainer.py")


@pytest.mark.distributed
@pytest.mark.parametrize("criterion", ["fisher", "l0"])
def test_two_processes_prune_like_one(tmp_path, criterion):
    results = {}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        output.mkdir()
        launch(SCRIPT, output, criterion, processes=processes)
        ranks = [json.loads((output / f"rank{r}.json").read_text()) for r in range(processes)]
        assert all(rank == ranks[0] for rank in ranks)
        results[processes] = ranks[0]
    one, two = results[1], results[2]
    assert one["structure"] == two["structure"]
    assert one["parameters"] == two["parameters"] < 40_000
    assert one["norm"] == pytest.approx(two["norm"], rel=1e-6)

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "2" / "final")
    sizes = {site.path: site.size for site in hfslim.find_units(model) if site.kind == "neurons"}
    kept = {path: len(site["kept"]) for path, site in two["structure"]["neurons"].items()}
    assert sizes == {path: size for path, size in kept.items() if size}


@pytest.mark.distributed
def test_two_processes_resume_exactly_and_skip_the_same_layers(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT), prepend=":")
    script = SCRIPT.with_name("resume_pruning.py")
    done = launched(script, tmp_path, "fisher", "l0", processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    # That is told of the stock Trainer alone.
    assert "average_tokens_across_devices" not in done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for criterion in ("fisher", "l0"):
        whole, resumed = f"{criterion} whole", f"{criterion} resumed"
        expected = ranks[0][whole]
        for found in (ranks[0][resumed], ranks[1][whole], ranks[1][resumed]):
            assert found["structure"] == expected["structure"]
            assert found["weights"].keys() == expected["weights"].keys()
            for name, value in expected["weights"].items():
                assert torch.equal(found["weights"][name], value)
    skipped = ranks[0]["layerdrop"]
    assert len(skipped) == 12
    assert ranks[1]["layerdrop"] == skipped
    assert len({tuple(layers) for layers in skipped}) > 3
