"""A recipe runs stage by stage, goes on where it ended, and overwrites only its own results."""

import csv
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recipe_files import (
    STAGES,
    STEP,
    audio_recipe,
    image_recipe,
    text_recipe,
)
from transformers import AutoModelForImageClassification, TrainingArguments

from hfslim.hub.push import PushError
from hfslim.pipeline.manifest import Manifest, OutputError, alone
from hfslim.pipeline.recipe import Recipe, RecipeError, parse_recipe
from hfslim.pipeline.run_state import RunState
from hfslim.pipeline.runner import run
from hfslim.pipeline.stages.prune import Prune
from hfslim.pipeline.task_examples import TaskExamples
from hfslim.tasks import DataConfig, build_model
from hfslim.training.checkpoint_folders import CheckpointError


def manifest(recipe: Recipe) -> dict[str, Any]:
    return json.loads((Path(recipe.output_dir) / "manifest.json").read_text())


@pytest.mark.parametrize("make", [text_recipe, image_recipe, audio_recipe])
def test_each_task_runs_from_transfer_to_report(tmp_path: Path, make) -> None:
    recipe = parse_recipe(make(tmp_path))
    last = run(recipe)
    out = Path(recipe.output_dir)
    assert last == out / "03-recover"
    for folder in ("01-transfer", "02-prune", "03-recover"):
        assert {"config.json", "model.safetensors"} <= {p.name for p in (out / folder).iterdir()}
    assert {p.name for p in out.iterdir()} == {
        *("01-transfer", "02-prune", "03-recover", "04-measure", "manifest.json"),
        *("report.json", "report.md", "report.html", "figures"),
    }
    stages = manifest(recipe)["stages"]
    assert all(stage["finished"] for stage in stages)
    assert all(0 <= stage["metrics"]["accuracy"] <= 1 for stage in stages[:3])
    report = json.loads((out / "04-measure" / "report.json").read_text())
    comparison = report["comparisons"][0]
    assert comparison["after"]["macs"] <= 0.6 * comparison["before"]["macs"]
    assert report["quality"][0]["teacher"] == stages[0]["metrics"]["accuracy"]
    assert {row["kind"] for row in report["structure"]} == {"heads", "neurons"}
    assert json.loads((out / "report.json").read_text()) == report
    assert [one["stage"] for one in report["history"]] == ["01-transfer", "02-prune", "03-recover"]
    assert [one["label"] for one in report["curve"]] == ["whole model", "02-prune", "03-recover"]
    for row, kept in zip(report["structure"], report["units"], strict=True):
        assert (kept["stage"], kept["path"]) == ("02-prune", row["path"])
        assert sum(kept["kept"]) * kept["total"] / len(kept["kept"]) == pytest.approx(row["kept"])
        assert len(kept["importance"]) == len(kept["kept"])
    said, quality = report["answers"], report["quality"][0]
    for side, value in (("confusion", "value"), ("teacher_confusion", "teacher")):
        right = sum(row[place] for place, row in enumerate(said[side]))
        assert right / said["examples"] == pytest.approx(quality[value])


def test_answers_keep_the_order_of_examples_that_are_grouped_by_length(tmp_path: Path) -> None:
    raw = text_recipe(tmp_path)
    with (tmp_path / "held.csv").open("w", newline="") as file:
        rows = [("good " * (i % 9 + 1), "plot", "up" if i % 2 else "down") for i in range(40)]
        csv.writer(file).writerows([("a", "b", "verdict"), *rows])
    arguments = TrainingArguments(
        str(tmp_path / "t"), use_cpu=True, train_sampling_strategy="group_by_length"
    )
    data, config = DataConfig(**raw["data"]), raw["model_config"]
    bench = TaskExamples.prepare(
        raw["task"], data, "accuracy", 0, arguments, None, config, raw["processor"]
    )
    model = build_model(bench.task, config, bench.examples.labels)
    judged = bench.evaluate(model)
    assert np.abs(judged.logits - bench.predict(model).logits).max() < 1e-5
    answers = bench.answers(judged)
    right = sum(both + mine for both, _, mine, _ in answers.right)
    assert judged.metrics["accuracy"] == pytest.approx(right / 40)


def test_a_second_run_goes_on_after_the_last_finished_stage(tmp_path: Path) -> None:
    raw = image_recipe(tmp_path)
    run(parse_recipe({**raw, "stages": STAGES[:1]}))
    weights = tmp_path / "out" / "01-transfer" / "model.safetensors"
    before = (weights.read_bytes(), weights.stat().st_mtime_ns)
    run(parse_recipe({**raw, "stages": STAGES[:2]}))
    assert (weights.read_bytes(), weights.stat().st_mtime_ns) == before
    assert [s["name"] for s in manifest(parse_recipe(raw))["stages"]] == ["transfer", "prune"]


def test_a_stage_that_changed_since_it_ran_is_refused(tmp_path: Path) -> None:
    raw = image_recipe(tmp_path)
    run(parse_recipe({**raw, "stages": [{"transfer": {"learning_rate": 1e-3}}]}))
    changed = parse_recipe({**raw, "stages": [{"transfer": {"learning_rate": 1e-4}}]})
    with pytest.raises(
        OutputError, match=r"stage 1 \(transfer\) has changed.*learning_rate was 0.001, now 0.0001"
    ):
        run(changed)
    with pytest.raises(
        OutputError, match=r"has changed.*seed was 42, now 1.*set another output_dir"
    ):
        run(parse_recipe({**raw, "stages": STAGES[:1], "seed": 1}))


def test_an_interrupted_stage_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    raw = image_recipe(tmp_path)
    training = {**STEP, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = {**raw, "training": training, "stages": STAGES[:1]}
    run(parse_recipe({**whole, "output_dir": str(tmp_path / "whole")}))
    run(parse_recipe({**whole, "output_dir": str(tmp_path / "cut")}))
    cut = tmp_path / "cut"
    record = json.loads((cut / "manifest.json").read_text())
    record["stages"][0]["finished"] = False
    (cut / "manifest.json").write_text(json.dumps(record))
    for name in ("checkpoint-4", "model.safetensors"):
        path = cut / "01-transfer" / ("training" if name.startswith("check") else "") / name
        path.rename(tmp_path / name)
    run(parse_recipe({**whole, "output_dir": str(cut)}))
    both = [
        AutoModelForImageClassification.from_pretrained(tmp_path / name / "01-transfer")
        for name in ("whole", "cut")
    ]
    for one, other in zip(both[0].parameters(), both[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    raw = image_recipe(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds thesis\.txt.*nothing was touched"):
        run(parse_recipe(raw))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_what_an_interrupted_beginning_leaves_is_not_something_else(tmp_path: Path) -> None:
    (tmp_path / ".manifest.json.123").write_text("{")
    (tmp_path / ".3f2a").touch()  # By which machines look whether they share the folder.
    assert Manifest.open(tmp_path, {}).stages == []


def test_a_disk_that_is_full_is_told_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(image_recipe(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    prune = Prune.run

    def limited(*arguments: Any) -> None:
        # The code that loads a cut model has 24 kB.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        prune(*arguments)

    try:
        with monkeypatch.context() as patch, pytest.raises(CheckpointError) as failure:
            patch.setattr(Prune, "run", limited)
            run(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = str(failure.value)
    assert told.startswith(f"02-prune could not be written into {tmp_path / 'out'}: ")
    assert "File too large" in told and "MiB free there" in told
    assert "the same command goes on from there" in told
    assert [entry["finished"] for entry in manifest(recipe)["stages"]] == [True, False]
    weights = tmp_path / "out" / "01-transfer" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    run(recipe)
    assert weights.stat().st_mtime_ns == before
    assert all(entry["finished"] for entry in manifest(recipe)["stages"])


def test_what_a_stage_made_is_on_the_disk_before_the_manifest_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    fsync = os.fsync

    def noted(handle: int) -> None:
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    missing = []

    def write(manifest: Manifest) -> None:
        for entry in manifest.stages:
            made = [path for path in (manifest.folder / entry.folder).rglob("*") if entry.finished]
            missing.extend(path for path in made if path.stat().st_ino not in flushed)
        written(manifest)

    written = Manifest.write
    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Manifest, "write", write)
    run(parse_recipe(image_recipe(tmp_path)))
    assert flushed and missing == []


def test_a_report_that_was_interrupted_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = parse_recipe(image_recipe(tmp_path)), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "hfslim.reporting.page.to_png", lambda plot: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        run(recipe)
    assert not (out / "report.json").exists()
    run(recipe)
    assert (out / "report.json").is_file() and list((out / "figures").glob("*.png"))


def test_a_second_run_of_the_same_folder_is_refused_while_the_first_lasts(tmp_path: Path) -> None:
    recipe, out = parse_recipe(image_recipe(tmp_path)), tmp_path / "out"
    with alone(out) as free:
        assert free
        with pytest.raises(OutputError, match=f"another run writes to {out}: give the command ag"):
            run(recipe)
    assert not list(out.iterdir())
    run(recipe)
    assert all(entry["finished"] for entry in manifest(recipe)["stages"])


def test_the_lock_of_a_run_that_was_killed_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from hfslim.pipeline.manifest import alone\n"
        "with alone(Path(sys.argv[1])) as free: print(free, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "True\n"
        with alone(tmp_path) as free:
            assert not free
        holder.kill()
    with alone(tmp_path) as free:
        assert free
    assert not list(tmp_path.iterdir())


def test_a_run_that_another_overtook_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found nothing when they began; the other was done when this one came to write."""
    recipe, out = parse_recipe(image_recipe(tmp_path)), tmp_path / "out"
    check_model = Prune.check_model

    def overtaken(stage: Prune, state: RunState) -> None:
        check_model(stage, state)
        out.mkdir()
        (out / "manifest.json").write_text("{}")

    monkeypatch.setattr(Prune, "check_model", overtaken)
    with pytest.raises(OutputError, match="another run writes"):
        run(recipe)
    assert [path.name for path in out.iterdir()] == ["manifest.json"]


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(OutputError, match=r"manifest\.json is damaged"):
        Manifest.open(tmp_path, {})


def test_later_results_do_not_outlive_an_earlier_stage(tmp_path: Path) -> None:
    record = Manifest(tmp_path, {})
    for name in ("01-transfer", "02-prune"):
        record.begin(name[3:], name, {}).finished = True
    (tmp_path / "02-prune").mkdir()
    with pytest.raises(OutputError, match=r"01-transfer is gone, but 02-prune came after it"):
        record.check(["transfer", "prune"], [{}, {}])


def test_gradual_pruning_ends_at_the_target(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = image_recipe(tmp_path)
    gradual = {
        "prune": {
            "target": {"sparsity": {"neurons": 0.5}},
            "units": ["neurons"],
            "max_steps": 4,
            "allow_untrained_teacher": True,
        }
    }
    with caplog.at_level("INFO", "hfslim"):
        run(parse_recipe({**raw, "stages": [STAGES[0], gradual]}))
    assert "by criterion fisher, gradually while training" in caplog.text
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "02-prune")
    widths = [m.out_features for n, m in model.named_modules() if n.endswith("mlp.fc1")]
    rows = manifest(parse_recipe(raw))["stages"][1]["structure"]
    assert sum(row["kept"] for row in rows) == 32
    assert sum(widths) == 32


def test_an_unreachable_target_is_refused_before_any_training(tmp_path: Path) -> None:
    raw = image_recipe(tmp_path)
    prune = {"prune": {"target": {"macs": 0.001}}}
    with pytest.raises(RecipeError, match=r"macs=0.001 cannot be reached.* are left"):
        run(parse_recipe({**raw, "stages": [STAGES[0], prune]}))
    assert not (tmp_path / "out").exists()


def test_a_metric_that_does_not_suit_the_labels_is_refused_before_any_work(tmp_path: Path) -> None:
    raw = image_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"'pearson' does not suit single_label.*'accuracy'"):
        run(parse_recipe({**raw, "metric": "pearson"}))
    assert not (tmp_path / "out").exists()


def test_measuring_needs_something_to_compare_with(tmp_path: Path) -> None:
    raw = image_recipe(tmp_path)
    with pytest.raises(RecipeError, match="nothing to compare with"):
        parse_recipe({**raw, "stages": [STAGES[0], STAGES[3]]})


def test_a_teacher_of_other_labels_is_refused(tmp_path: Path) -> None:
    raw = image_recipe(tmp_path)
    run(parse_recipe({**raw, "stages": STAGES[:1]}))
    other = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "01-transfer")
    other.config.id2label = {0: "cat", 1: "dog"}
    other.save_pretrained(tmp_path / "teacher")
    stages = [{"distil": {"teacher": str(tmp_path / "teacher"), "allow_untrained_teacher": True}}]
    with pytest.raises(ValueError, match=r"labels of teacher and student do not match.*blue.*cat"):
        run(parse_recipe({**raw, "stages": stages, "output_dir": str(tmp_path / "new")}))


def test_a_push_that_failed_keeps_the_results_and_a_second_run_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = image_recipe(tmp_path)
    stages = [*STAGES[:2], STAGES[3], STAGES[2], {"push": {"hub_model_id": "me/small"}}]
    calls: list[str] = []

    def down(folder: Path, *_: Any, **__: Any) -> None:
        calls.append(str(folder))
        raise PushError("the Hub is down")

    monkeypatch.setattr("hfslim.pipeline.runner.check_login", lambda: None)
    monkeypatch.setattr("hfslim.pipeline.stages.push.push", down)
    with pytest.raises(PushError):
        run(parse_recipe({**raw, "stages": stages}))
    folder = tmp_path / "out" / "05-push"
    assert calls == [str(folder)]
    assert {"config.json", "model.safetensors", "recipe.yaml", "report.json"} <= {
        p.name for p in folder.iterdir()
    }
    trained = (tmp_path / "out" / "04-recover" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(
        "hfslim.pipeline.stages.push.push", lambda *_, **__: SimpleNamespace(commit_url="")
    )
    run(parse_recipe({**raw, "stages": stages}))
    assert (tmp_path / "out" / "04-recover" / "model.safetensors").stat().st_mtime_ns == trained
    assert manifest(parse_recipe({**raw, "stages": stages}))["stages"][-1]["finished"]
    report = json.loads((folder / "report.json").read_text())
    assert report["comparisons"] == [], "the model was trained on since it was measured"
    assert report["quality"][0]["examples"] == 8
    assert report["provenance"]["base"]["name"] == "vit, untrained"
    assert report["model"] == "vit", "it is trained by now"


def test_a_recipe_that_pushes_needs_a_login_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = image_recipe(tmp_path)
    stages = [STAGES[0], {"push": {"hub_model_id": "me/small"}}]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set: unset it to push"):
        run(parse_recipe({**raw, "stages": stages}))
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match=r"push: Repo id must .*'me/small/no'"):
        parse_recipe({**raw, "stages": [STAGES[0], {"push": {"hub_model_id": "me/small/no"}}]})
