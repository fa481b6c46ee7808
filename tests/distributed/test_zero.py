"""DeepSpeed's ZeRO on two CPU processes: `make test-deepspeed`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import zero
from distributed.launch import START, launch
from places import ROOT
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

pytestmark = [pytest.mark.deepspeed, pytest.mark.distributed]

SCRIPT = Path(zero.__file__)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests' / 'support'}", prepend=":")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def equal(one: Path, other: Path, auto=AutoModelForSequenceClassification, atol=1e-5) -> None:
    expected, found = (auto.from_pretrained(path).state_dict() for path in (one, other))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol)


def resumed(run: Path, stage: str, what: str) -> Path:
    """Go on, in another launch, from the first checkpoint of a run; the second one is broken."""
    again = run.parents[1] / "again" / what
    for name in ("checkpoint-3", "checkpoint-6"):
        shutil.copytree(run / name, again / name)
    parts = sorted((again / "checkpoint-6").glob("global_step6/*optim_states.pt"))
    assert len(parts) == 2
    parts[1].unlink()
    told = launch(SCRIPT, again.parent, stage, what, processes=2)
    assert told.count("began at step 3") == 2
    return again


@pytest.mark.parametrize(
    ("stage", "ways"), [("2", ("prune", "layerdrop")), ("3", ("distil", "layerdrop"))]
)
def test_zero_trains_like_one_process_and_resumes(
    stage: str, ways: tuple[str, ...], tmp_path: Path
) -> None:
    told = launch(SCRIPT, tmp_path / "two", stage, *ways, processes=2)
    assert told.count(f"the teacher is {'split' if stage == '3' else 'whole'}") == 4
    for what in ways:
        zero.train(tmp_path / "one" / what, 0, what)
        equal(tmp_path / "one" / what / "saved", tmp_path / "two" / what / "saved")
    again = resumed(tmp_path / "two" / ways[0], stage, ways[0])
    equal(tmp_path / "two" / ways[0] / "saved", again / "saved", atol=0)


def test_what_zero3_distilled_is_cut_like_what_one_process_did(tmp_path: Path) -> None:
    zero.train(tmp_path / "one", 0, "distil")
    launch(SCRIPT, tmp_path / "two", "3", "distil", "prune", "parts", processes=2)
    for folder in (tmp_path / "one", tmp_path / "two" / "distil"):
        zero.cut(folder)
    equal(tmp_path / "one" / "cut", tmp_path / "two" / "distil" / "cut")
    refused = json.loads((tmp_path / "two" / "refused.json").read_text())
    assert refused.keys() == {"prune", "parts"}
    assert "what ZeRO-3 splits between them: use DDP or ZeRO-2" in refused["prune"]
    assert "was built in the parts of ZeRO-3" in refused["parts"]
    assert "zero3_init_flag: false" in refused["parts"]


def recipe(
    configuration: str, output: Path, processes: int, **prune: str
) -> "subprocess.CompletedProcess[str]":
    """Run the digits' recipe in float32 for three steps of 64 examples."""
    values = {
        "output_dir": str(output),
        "training.max_steps": "3",
        "training.per_device_train_batch_size": str(64 // processes),
        # The least gradients are rounding errors, which Adam would make as large as others.
        "training.adam_epsilon": "1e-4",
        "training.disable_tqdm": "true",
        "data.max_eval_samples": "64",
        **{f"stages.prune.{name}": value for name, value in prune.items()},
        "stages.recover.allow_untrained_teacher": "true",
        "stages.measure.batch_sizes": "[1]",
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", f"accelerate_configs/{configuration}.yaml"]
    command += ["--num_processes", str(processes), "--mixed_precision", "no"]
    command += [str(START), "recipes/compress.py", "recipes/image/digits_vit.yaml"]
    command += [part for key, value in values.items() for part in (f"--{key}", value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_recipe_comes_to_the_report_of_one_process_under_zero2_and_zero3(tmp_path: Path) -> None:
    # What `obs` finds equal to the last bits in a model that is hardly trained, rounding decides.
    how = {"max_examples": "64", "criterion": "fisher", "reconstruction": "none"}
    assert recipe("cpu", tmp_path / "one", 1, **how).returncode == 0
    for name in ("deepspeed_zero2", "deepspeed_zero3"):
        done = recipe(name, tmp_path / name, 2, **how)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert (tmp_path / name / "report.md").is_file()
        for stage in ("01-transfer", "02-prune", "03-recover"):
            one, two = (tmp_path / run / stage for run in ("one", name))
            equal(one, two, AutoModelForImageClassification)


def test_a_recipe_that_prunes_gradually_is_refused_under_zero3_before_it_trains(
    tmp_path: Path,
) -> None:
    done = recipe("deepspeed_zero3", tmp_path / "run", 2, num_train_epochs="1")
    assert done.returncode != 0
    assert "stages[2] prune: gradual pruning cannot be trained under ZeRO-3" in done.stderr
    assert "multi_gpu.yaml or accelerate_configs/deepspeed_zero2.yaml" in done.stderr
    assert not (tmp_path / "run").exists()
