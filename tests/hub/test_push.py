"""A push is one commit that is complete; what goes wrong is tried again, or said in a line."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_environment import environment
from hub_server import Fault, Hub, serve
from models import tiny
from places import SUPPORT
from structures import uneven

import hfslim
from hfslim.hub.edits import MARKER

CLIENT = SUPPORT / "hub_client.py"
FILES = {"README.md", "config.json", "model.safetensors", "modeling_hfslim.py"}
ALWAYS = 1000


@pytest.fixture(scope="module")
def hub():
    with serve(lab="hf_lab", guest="hf_guest") as hub:
        yield hub


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    model, folder = tiny("bert"), tmp_path_factory.mktemp("pruned")
    hfslim.shrink(model, uneven(model))
    model.save_pretrained(folder)
    (folder / "modeling_hfslim.py").unlink()
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "model.safetensors").write_bytes(b"")
    return folder


def client(hub: Hub, home: Path, *jobs: dict, token: str | None = "hf_lab") -> list[dict]:
    done = subprocess.run(
        [sys.executable, str(CLIENT), json.dumps(jobs)],
        env=environment(hub, home, token),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def edit(hub: Hub, repo_id: str, text: str) -> None:
    """Edit the card as a user does on the Hub's page."""
    repo = hub.repos[repo_id]
    head = repo.branches["main"][-1]
    card = head.files.get("README.md", f"---\nlicense: mit\n---\n{MARKER}\n".encode())
    repo.commit("main", "edit", {**head.files, "README.md": card + text.encode()})


CONFLICT = "Cannot create repo: another conflicting operation is in progress"
FAULTS = {
    "create-500": Fault("repos/create", 500),
    "create-409": Fault("repos/create", 409, 2, CONFLICT),
    "preupload-500": Fault("lab/preupload-500/preupload", 500, 2),
    "upload-drops": Fault("PUT /lab/upload-drops/lfs", None, 2),
    "upload-dead": Fault("PUT /lab/upload-dead/lfs", None, ALWAYS),
    "card-500": Fault("api/validate-yaml", 500),
    "commit-500": Fault("lab/commit-500/commit", 500),
    "commit-dead": Fault("lab/commit-dead/commit", 500, ALWAYS),
    "commit-lost": Fault("lab/commit-lost/commit", None, done=True),
    "commit-412": Fault("lab/commit-412/commit", 412),
}
DEAD = ("upload-dead", "commit-dead")


@pytest.fixture(scope="module")
def faulty(hub, pruned, tmp_path_factory):
    """What two processes saw that push to repositories with a fault each: before, and mended."""
    root = tmp_path_factory.mktemp("faults")
    jobs = []
    for name in FAULTS:
        shutil.copytree(pruned, root / name)
        jobs.append({"folder": str(root / name), "repo_id": f"lab/{name}"})
    FAULTS["commit-412"].then = lambda: edit(hub, "lab/commit-412", "\nKindly edited.\n")
    hub.faults[:] = FAULTS.values()
    first = dict(zip(FAULTS, client(hub, root / "home", *jobs), strict=True))
    left = {
        name: (hub.titles(f"lab/{name}"), {p.name for p in (root / name).iterdir()})
        for name in DEAD
    }
    hub.faults.clear()
    again = [job for job in jobs if job["folder"].endswith(DEAD)]
    second = dict(zip(DEAD, client(hub, root / "home", *again), strict=True))
    return first, left, second


@pytest.mark.parametrize("name", sorted(FAULTS.keys() - DEAD))
def test_a_fault_that_passes_is_tried_again(hub, faulty, name):
    first, _, _ = faulty
    assert FAULTS[name].times == 0, "the fault did not happen"
    commit = hub.repos[f"lab/{name}"].at("main")
    assert first[name] == {"commit": commit.oid}
    assert FILES <= commit.files.keys()
    assert hub.titles(f"lab/{name}").count("Upload model") == 1


@pytest.mark.parametrize("name", DEAD)
def test_a_fault_that_stays_is_told_in_a_line_and_pushes_nothing(hub, faulty, name):
    first, left, second = faulty
    assert re.fullmatch(
        rf"'lab/{name}': .*; push again to complete it, .* is complete", first[name]["error"]
    )
    titles, kept = left[name]
    assert titles == []
    assert kept >= FILES - {"modeling_hfslim.py"}
    assert second[name] == {"commit": hub.repos[f"lab/{name}"].at("main").oid}
    assert FILES <= hub.repos[f"lab/{name}"].at("main").files.keys()


def test_an_edit_of_the_card_during_the_push_is_not_lost(hub, faulty):
    card = hub.read("lab/commit-412", "README.md")
    assert "license: mit" in card
    assert card.endswith("Kindly edited.\n")
    assert "## Load it" in card


@pytest.fixture(scope="module")
def refused(hub, pruned, tmp_path_factory):
    home, folder = tmp_path_factory.mktemp("refused"), str(pruned)
    mine = {"folder": folder, "repo_id": "lab/mine", "private": True}
    return client(
        hub,
        home,
        mine,
        mine | {"token": "hf_wrong", "commit_message": "wrong"},
        mine | {"token": "hf_guest", "commit_message": "guest"},
        {"folder": folder, "repo_id": "other/theirs"},
        {"folder": folder, "repo_id": "no/such/place"},
        {"folder": str(home), "repo_id": "lab/empty"},
    )


def test_without_the_right_token_nothing_is_pushed(hub, refused):
    made, wrong, guest, elsewhere, misnamed, empty = refused
    assert hub.repos["lab/mine"].private
    assert made == {"commit": hub.repos["lab/mine"].at("main").oid}
    assert hub.titles("lab/mine") == ["Upload model"]
    assert "'lab/mine': the Hub refused the token: log in with `hf auth login`" in wrong["error"]
    assert "nothing was pushed" in wrong["error"]
    assert "'lab/mine': the token may not write there" in guest["error"]
    assert "'other/theirs': the token may not write there" in elsewhere["error"]
    assert "no/such/place" in misnamed["error"]
    assert "has no config.json" in empty["error"]
    assert hub.repos.keys() & {"other/theirs", "no/such/place", "lab/empty"} == set()
    assert all("\n" not in one["error"] for one in refused[1:])


def test_pickles_and_checkpoints_are_left_out_and_the_loader_is_put_in(hub, refused):
    files = hub.repos["lab/mine"].at("main").files
    assert files.keys() == FILES | {".gitattributes"}


def test_a_second_push_is_one_commit_and_takes_away_what_is_gone(hub, pruned, tmp_path):
    shutil.copytree(pruned, tmp_path / "model")
    job = {"folder": str(tmp_path / "model"), "repo_id": "lab/twice"}
    first = client(hub, tmp_path / "home", job, job, job | {"revision": "dev"})
    head = hub.repos["lab/twice"].at("main")
    assert first == [{"commit": head.oid}] * 3
    assert hub.titles("lab/twice") == ["Upload model"]
    repo = hub.repos["lab/twice"]
    theirs = {"model-00001-of-00002.safetensors": b"old", "adapter_model.safetensors": b"theirs"}
    repo.commit("main", "other", {**head.files, **theirs})
    edit(hub, "lab/twice", "\nMy thanks.\n")
    (tmp_path / "model" / "recipe.yaml").write_text("task: text-classification\n")
    (second,) = client(hub, tmp_path / "home", job | {"commit_message": "Second"})
    now = hub.repos["lab/twice"].at("main")
    assert second == {"commit": now.oid}
    assert now.files.keys() == head.files.keys() | {"recipe.yaml", "adapter_model.safetensors"}
    assert hub.read("lab/twice", "README.md").endswith("My thanks.\n")
    assert hub.repos["lab/twice"].at("dev").oid == head.oid
    assert (tmp_path / "model" / "README.md").read_text().endswith("My thanks.\n")


def test_without_any_token_the_way_to_log_in_is_told(hub, pruned, tmp_path):
    job = {"folder": str(pruned), "repo_id": "lab/nobody"}
    (answer,) = client(hub, tmp_path, job, token=None)
    assert "no token: log in with `hf auth login`, or set HF_TOKEN" in answer["error"]
    assert "lab/nobody" not in hub.repos
