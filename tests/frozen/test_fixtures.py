"""Folders that were saved before still load, resume and report: make_fixtures.py wrote them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import make_fixtures as made
import pytest
import record
import torch
import transformers
from safetensors.torch import load_file

import hfslim

ELSEWHERE = Path(__file__).resolve().parents[1] / "support" / "without_hfslim.py"
WITH_CODE = ("bert", "resnet")


def expected(folder):
    return json.loads((folder / "expected.json").read_text())


def close(found, said):
    torch.testing.assert_close(found, torch.tensor(said), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", made.PRUNED)
@torch.no_grad()
def test_a_pruned_model_loads_says_the_same_and_saves_the_same(name, tmp_path):
    folder = made.FIXTURES / "pruned" / name
    said = expected(folder)
    load = getattr(transformers, said["auto_class"]).from_pretrained
    model = load(folder).eval()
    assert type(model).__module__.startswith("transformers.")
    assert sum(parameter.numel() for parameter in model.parameters()) == said["parameters"]
    inputs = torch.load(folder / "inputs.pt")
    close(model(**inputs).logits, said["logits"])

    model.save_pretrained(tmp_path)
    old, new = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert old.keys() == new.keys()
    assert all(torch.equal(value, new[tensor]) for tensor, value in old.items())
    close(load(tmp_path).eval()(**inputs).logits, said["logits"])


@pytest.mark.parametrize("name", made.PRUNED)
@torch.no_grad()
def test_the_same_cut_today_gives_the_same_model(name):
    folder = made.FIXTURES / "pruned" / name
    said, model = expected(folder), made.whole(name)
    hfslim.shrink(model, hfslim.Structure.from_dict(said["structure"]))
    close(model.eval()(**torch.load(folder / "inputs.pt")).logits, said["logits"])


def test_a_narrowed_model_needs_nothing_of_hfslim():
    folder = made.FIXTURES / "pruned" / "bert-narrowed"
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_size"] == 24
    assert not {"hfslim", "quantization_config", "auto_map"} & config.keys()


def test_a_pruned_model_loads_with_its_own_code_where_hfslim_is_not_installed(tmp_path):
    jobs = []
    for name in (*WITH_CODE, "bert-narrowed"):
        shutil.copytree(made.FIXTURES / "pruned" / name, tmp_path / name)
        said = expected(tmp_path / name)
        jobs.append([str(tmp_path / name), said["auto_class"], name in WITH_CODE])
    done = subprocess.run(
        [sys.executable, str(ELSEWHERE), json.dumps(jobs)],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for folder, auto_class, _ in jobs:
        outputs, said = torch.load(Path(folder) / "outputs.pt"), expected(Path(folder))["logits"]
        close(outputs["first"], said)
        close(outputs["second"], said)
        # What the travelling code saved again, the installed package loads.
        model = getattr(transformers, auto_class).from_pretrained(Path(folder) / "again").eval()
        with torch.no_grad():
            close(model(**torch.load(Path(folder) / "inputs.pt")).logits, said)


@pytest.mark.parametrize("kind", ["stock", "distillation"])
def test_training_resumes_from_an_old_checkpoint(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = made.FIXTURES / "resume" / kind
    trainer, pruning = made.trainer_of(kind)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{made.SAVED_AT}"))
    found, said = made.outcome(trainer, pruning), expected(folder)
    assert trainer.state.global_step == made.TRAINING["max_steps"]
    assert found["structure"] == said["structure"]
    assert found["norms"].keys() == said["norms"].keys()
    assert found["norms"] == pytest.approx(said["norms"], rel=1e-3, abs=1e-4)
    assert record.farthest(said["logits"], found["logits"]) < 1e-3


@pytest.fixture
def finished(tmp_path, monkeypatch):
    shutil.copytree(made.FIXTURES / "recipe", tmp_path / "recipe")
    monkeypatch.chdir(tmp_path / "recipe")
    return tmp_path / "recipe" / "out"


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_report_reads_an_old_folder(finished):
    record.command("report", "out")
    assert (finished / "report.html").stat().st_size > 10_000
    assert list((finished / "figures").glob("*.png"))


def test_a_recipe_that_had_finished_is_not_run_again(finished):
    before = {path: path.read_bytes() for path in finished.rglob("*.safetensors")}
    stages = manifest(finished)
    record.command("run", "recipe.yaml")
    assert manifest(finished) == stages
    assert {path: path.read_bytes() for path in finished.rglob("*.safetensors")} == before


def test_a_recipe_goes_on_from_old_stages(finished):
    weights = (finished / "02-prune" / "model.safetensors").read_bytes()
    old = json.loads((finished / "report.json").read_text())
    shutil.rmtree(finished / "03-measure")
    record.command("run", "recipe.yaml")
    assert (finished / "02-prune" / "model.safetensors").read_bytes() == weights
    new = json.loads((finished / "report.json").read_text())
    old, new = ({**record.lasting(one), "provenance": 0} for one in (old, new))
    assert record.compared("cli", old, new) == []
