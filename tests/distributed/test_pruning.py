import json
from pathlib import Path

import pytest
from distributed.launch import launch
from transformers import AutoModelForSequenceClassification

import hfslim

SCRIPT = Path(__file__).with_name("prune_in_stock_trainer.py")


@pytest.mark.distributed
def test_two_processes_prune_like_one(tmp_path):
    results = {}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        output.mkdir()
        launch(SCRIPT, output, processes=processes)
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
