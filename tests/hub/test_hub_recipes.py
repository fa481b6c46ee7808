"""Recipes and Trainers push over HTTP, and strangers load it by the ways that its card names."""

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from hub_environment import environment
from hub_loader import heard
from hub_server import Hub, card_errors, serve
from huggingface_hub import ModelCard
from models import tiny
from places import ROOT
from recipe_files import WIDTHS, audio_recipe, image_recipe, text_recipe
from safetensors.torch import load, load_file
from structures import uneven
from transformers import AutoTokenizer, pipeline

import hfslim
from hfslim.anatomy.inputs import example_inputs
from hfslim.pipeline.recipe import load_recipe, parse_recipe
from hfslim.reporting.report import Report

PUSHED = {
    *("README.md", "config.json", "model.safetensors", "modeling_hfslim.py"),
    *("recipe.yaml", "report.json", "structure.png"),
}
TASKS = {
    "text": ("text-classification", "AutoModelForSequenceClassification", text_recipe),
    "image": ("image-classification", "AutoModelForImageClassification", image_recipe),
    "audio": ("audio-classification", "AutoModelForAudioClassification", audio_recipe),
}
PRUNE = {"target": {"macs": 0.6}, "max_examples": 4, "criterion": "random"}


@pytest.fixture(scope="module")
def hub():
    with serve(lab="hf_lab") as hub:
        hub.datasets.add("org/data")
        yield hub


def start(hub: Hub, folder: Path, *command: str, token: str = "hf_lab") -> subprocess.Popen:
    env = environment(hub, folder / "home", token) | {"OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(folder / "modules")}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], env=env, cwd=ROOT, **pipes)


def end(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate()
    assert process.returncode == code, err[-4000:]
    return out, err


def base_model(hub: Hub, folder: Path, tokenizer: str) -> None:
    """Put a text model on the Hub, as the one that the recipe starts from."""
    widths = {**WIDTHS, "intermediate_size": 32, "vocab_size": 9, "max_position_embeddings": 16}
    tiny("bert", num_labels=2, **widths).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.put("lab", "base", files)


@pytest.fixture(scope="module")
def runs(hub, tmp_path_factory) -> Path:
    """Each task's recipe, run by the launcher; the image's first with a wrong token."""
    root = tmp_path_factory.mktemp("runs")
    for name, (_, _, make) in TASKS.items():
        (root / name).mkdir()
        raw = make(root / name)
        push: list[dict] = [{"push": {"hub_model_id": f"lab/{name}"}}]
        if name == "text":
            base_model(hub, root / "base", raw["processor"])
            del raw["processor"], raw["model_config"]
            raw["model"] = "lab/base"
            push.append({"push": {"hub_model_id": "lab/text", "hub_revision": "v2"}})
        if name == "audio":
            push[0]["push"]["hub_private_repo"] = True
        stages = [{"prune": PRUNE} if "prune" in stage else stage for stage in raw["stages"]]
        (root / f"{name}.yaml").write_text(yaml.safe_dump({**raw, "stages": [*stages, *push]}))
    launcher = "recipes/compress.py"
    wrong = start(hub, root / "image", launcher, str(root / "image.yaml"), token="hf_wrong")
    (root / "wrong.txt").write_text(end(wrong, code=1)[1])
    assert "lab/image" not in hub.repos
    started = [start(hub, root / name, launcher, str(root / f"{name}.yaml")) for name in TASKS]
    for process in started:
        end(process)
    return root


@pytest.fixture(scope="module")
def trained(hub, tmp_path_factory) -> Path:
    """What each Trainer pushed, and the line that a wrong token was answered."""
    root = tmp_path_factory.mktemp("trainers")
    out, _ = end(start(hub, root, "tests/support/hub_trainers.py", str(root)))
    (root / "wrong.json").write_text(out.splitlines()[-1])
    return root


def example(root: Path, name: str) -> Any:
    if name == "text":
        return "good film plot"
    folder = root / name / "held"
    return str(next(folder.rglob("*.png" if name == "image" else "*.wav")))


@pytest.fixture(scope="module")
def loaded(hub, runs, trained, tmp_path_factory) -> Path:
    """What two fresh processes found: one with hfslim, one without."""
    root = tmp_path_factory.mktemp("loaded")
    models = []
    for name, (task, auto_class, _) in TASKS.items():
        local = getattr(transformers, auto_class).from_pretrained(
            runs / name / "out" / "03-recover"
        )
        length = 1200 if name == "audio" else 12
        torch.save(example_inputs(local, 2, seed=3, length=length), root / f"{name}.pt")
        models.append((f"lab/{name}", auto_class, task, None, example(runs, name)))
    models.append(("lab/text", TASKS["text"][1], TASKS["text"][0], "v2", example(runs, "text")))
    torch.save(example_inputs(tiny("vit"), 4, seed=3), root / "vit.pt")
    for repo_id in ("lab/stock", "lab/slim", "lab/distilled", "lab/direct"):
        for commits in hub.repos[repo_id].branches.values():
            models += [(repo_id, TASKS["image"][1], None, c.oid, None) for c in commits[1:]]
    for ours in (True, False):
        jobs = []
        for repo, auto_class, task, revision, shown in models:
            key = f"{repo.removeprefix('lab/')}-{revision}-{ours}"
            inputs = root / f"{repo.removeprefix('lab/')}.pt" if task else root / "vit.pt"
            job = {"repo": repo, "auto_class": auto_class, "task": task, "revision": revision}
            job |= {"inputs": str(inputs), "example": shown}
            job |= {"logits": str(root / f"{key}.logits"), "answer": str(root / f"{key}.json")}
            jobs.append(job)
        (root / f"work-{ours}.json").write_text(json.dumps({"hfslim": ours, "models": jobs}))
        end(
            start(
                hub,
                root / str(ours),
                "tests/support/hub_loader.py",
                str(root / f"work-{ours}.json"),
            )
        )
    return root


WAYS = pytest.mark.parametrize("ours", [True, False], ids=["with hfslim", "without hfslim"])


@WAYS
@pytest.mark.parametrize("name", TASKS)
@torch.no_grad()
def test_a_stranger_gets_the_very_logits(runs, loaded, name, ours):
    task, auto_class, _ = TASKS[name]
    folder = runs / name / "out" / "03-recover"
    local = getattr(transformers, auto_class).from_pretrained(folder).eval()
    assert local.config.hfslim["shapes"], "the structure is one that a plain config can say"
    expected = local(**torch.load(loaded / f"{name}.pt")).logits
    assert torch.equal(torch.load(loaded / f"{name}-None-{ours}.logits"), expected)
    answer = pipeline(task, model=str(folder))(heard(example(runs, name)))
    assert json.loads((loaded / f"{name}-None-{ours}.json").read_text()) == answer


@WAYS
def test_a_second_revision_loads_too(loaded, ours):
    one, two = (torch.load(loaded / f"text-{r}-{ours}.logits") for r in ("None", "v2"))
    assert torch.equal(one, two)


@pytest.mark.parametrize("name", TASKS)
def test_a_recipe_pushes_all_in_one_commit(hub, runs, name):
    assert hub.titles(f"lab/{name}") == ["Upload model"]
    files = hub.repos[f"lab/{name}"].at("main").files
    processor = "tokenizer.json" if name == "text" else "preprocessor_config.json"
    assert PUSHED | {processor} <= files.keys()
    assert not [n for n in files if n.endswith((".bin", ".pt", ".pth")) or n.startswith("check")]
    assert hub.repos[f"lab/{name}"].private == (name == "audio")


@pytest.mark.parametrize("name", TASKS)
def test_the_recipe_on_the_hub_is_the_one_that_ran(hub, runs, name):
    pushed = parse_recipe(yaml.safe_load(hub.read(f"lab/{name}", "recipe.yaml")))
    assert pushed == load_recipe(runs / f"{name}.yaml")


def test_a_wrong_token_is_told_before_the_first_stage(runs):
    line = (runs / "wrong.txt").read_text().strip().splitlines()[-1]
    assert line.startswith("error: the Hub: the Hub refused the token: log in with `hf auth login`")
    assert "Traceback" not in (runs / "wrong.txt").read_text()


@pytest.mark.parametrize("name", TASKS)
def test_the_card_is_valid_and_its_figures_are_the_reports(hub, runs, name):
    text = hub.read(f"lab/{name}", "README.md")
    assert card_errors(text) == []
    card = ModelCard(text)
    report = json.loads(hub.read(f"lab/{name}", "report.json"))
    one, quality, made = report["comparisons"][0], report["quality"][0], report["provenance"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    table = {row[0]: row[1:] for row in rows if row}
    for key, row in (
        ("parameters", "parameters"),
        ("parameters_without_embeddings", "parameters without embeddings"),
        ("bytes", "bytes of weights"),
        ("macs", "MACs, batch 1"),
    ):
        assert table[row][:2] == [f"{one[side][key]:,}" for side in ("before", "after")]
    for key, row in (("p50_ms", "p50 ms"), ("p95_ms", "p95 ms"), ("throughput", "examples/s")):
        digits = 1 if key == "throughput" else 2
        shown = [f"{one[side]['latency'][key]:,.{digits}f}" for side in ("before", "after")]
        assert table[f"{row}, batch 1"][:2] == shown
    before, after = quality["teacher"], quality["value"]
    assert quality["examples"] == 8  # So few carry two decimals.
    expected = [f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}"]
    assert table["accuracy"][1:] == [*expected, str(quality["examples"]), "42"]
    (result,) = card.data.eval_results
    assert (result.metric_value, result.task_type) == (after, TASKS[name][0])
    stated = (one["after"]["inputs"], "1 threads", made["machine"]["hardware"])
    assert all(fact in text for fact in (*stated, f"torch {made['machine']['versions']['torch']}"))
    for row in report["structure"]:
        assert table[f"`{row['path']}`"][0::2] == [row["kind"], f"{row['kept']} / {row['total']}"]
    assert table["importance criterion"] == ["2. prune: random"]
    assert "03-recover: 0.5 · loss_hard + 0.5 · loss_distillation" in table["loss"][0]
    assert "01-transfer of this recipe" in table["teacher"][0]
    assert card.data.tags == ["hfslim", "pruned", "distilled", TASKS[name][0]]
    assert card.data.pipeline_tag == TASKS[name][0]


def test_the_base_model_is_the_hubs_with_its_revision(hub, runs):
    card = ModelCard(hub.read("lab/text", "README.md"))
    commit = hub.repos["lab/base"].at("main").oid
    assert (card.data.base_model, card.data.base_model_relation) == ("lab/base", "finetune")
    assert f"[lab/base]({hub.url}/lab/base), revision {commit}" in card.text
    assert "base_model" not in ModelCard(hub.read("lab/image", "README.md")).data.to_dict()


@pytest.mark.parametrize("name", [*TASKS, "slim", "distilled", "direct"])
def test_no_link_of_the_card_is_broken(hub, runs, trained, name):
    revision = "dev" if name == "distilled" else "main"
    text = hub.read(f"lab/{name}", "README.md", revision)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert ("structure.png" in links) == (name in TASKS)
    for link in links:
        if "://" not in link:
            link = f"{hub.url}/lab/{name}/resolve/{revision}/{link}"
        request = urllib.request.Request(link)
        request.add_unredirected_header("Authorization", "Bearer hf_lab")
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200


@pytest.mark.parametrize("name", ["stock", "slim", "distilled", "direct"])
def test_every_commit_of_a_trainer_loads_both_ways(hub, trained, loaded, name):
    (branch,) = [b for b, c in hub.repos[f"lab/{name}"].branches.items() if len(c) > 1]
    commits = hub.repos[f"lab/{name}"].branches[branch][1:]
    keys = load(commits[-1].files["model.safetensors"]).keys()
    for commit in commits:
        assert {"config.json", "modeling_hfslim.py", "model.safetensors"} <= commit.files.keys()
        assert load(commit.files["model.safetensors"]).keys() == keys
        found = [
            torch.load(loaded / f"{name}-{commit.oid}-{ours}.logits") for ours in (True, False)
        ]
        assert torch.equal(*found)
    expected = torch.load(trained / ("slim" if name == "direct" else name) / "logits.pt")
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


def test_pushes_in_training_have_the_key_names_of_the_hub(hub, trained, tmp_path):
    model = tiny("vit")
    hfslim.shrink(model, uneven(model))
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names != model.state_dict().keys()
    first = hub.repos["lab/slim"].branches["main"][1]
    assert first.title == "Training in progress, step 1"
    assert load(first.files["model.safetensors"]).keys() == names


def test_our_trainers_push_their_card_and_no_pickle_but_to_resume_from(hub, trained):
    slim = hub.repos["lab/slim"].at("main")
    assert not [name for name in slim.files if name.endswith((".bin", ".pt", ".pth"))]
    card = ModelCard(slim.files["README.md"].decode())
    assert (card.data.language, card.data.datasets) == ("en", ["org/data"])
    assert "generated_from_trainer" not in card.data.tags and "scratch" not in card.text
    distilled = hub.repos["lab/distilled"]
    assert distilled.private and hub.titles("lab/distilled") == []
    files = distilled.at("dev").files
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/modeling_hfslim.py"} <= files.keys()
    report = Report.from_dict(json.loads(files["report.json"]))
    assert report.provenance.losses == {
        "train": "0.5 · loss_hard + 0.5 · loss_distillation (kl), temperature 2"
    }
    assert "a ViTForImageClassification that was passed" in files["README.md"].decode()
    assert hub.repos["lab/direct"].at("main").files["README.md"].count(b"- mine") == 1


def test_a_wrong_token_is_told_when_the_trainer_is_made(hub, trained):
    assert json.loads((trained / "wrong.json").read_text()).startswith("'lab/wrong': the Hub ref")
    assert "lab/wrong" not in hub.repos
