"""A checkpoint from a stranger: nothing of it runs, nothing outside its folder is read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny
from structures import uneven
from transformers import AutoModelForSequenceClassification

import hfslim
from hfslim.hub.format import modeling_hfslim
from hfslim.hub.format.modeling_hfslim import BlueprintError

WITHOUT = """
import sys
sys.modules["hfslim"] = None
from transformers import AutoModelForSequenceClassification
AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.mark, "boom"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pruned model in two shards."""
    model = tiny("bert")
    hfslim.shrink(model, uneven(model))
    model.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    return tmp_path / "model"


def load(folder: Path, **arguments):
    return AutoModelForSequenceClassification.from_pretrained(folder, **arguments)


def load_by_its_own_class(folder: Path, **arguments):
    """As `trust_remote_code=True` does."""
    return modeling_hfslim.SlimBertForSequenceClassification.from_pretrained(folder, **arguments)


def pickled(folder: Path, content: object) -> None:
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    torch.save(content, folder / "pytorch_model.bin")


WAYS = pytest.mark.parametrize("way", [load, load_by_its_own_class], ids=["stock", "own"])


@WAYS
def test_pickled_weights_are_refused(way, folder: Path) -> None:
    pickled(folder, load(folder).state_dict())
    with pytest.raises((BlueprintError, OSError), match="safetensors"):
        way(folder)


@WAYS
@pytest.mark.parametrize("arguments", [{}, {"weights_only": False}], ids=["", "weights_only=False"])
def test_a_pickle_is_never_run(way, arguments, folder: Path, tmp_path: Path) -> None:
    pickled(folder, Bomb(tmp_path / "mark"))
    with pytest.raises(Exception, match=r"safetensors|[Ww]eights.only"):
        way(folder, **arguments)
    assert not (tmp_path / "mark").exists()
    with pytest.raises(AttributeError):
        torch.load(folder / "pytorch_model.bin", weights_only=False).items()
    assert (tmp_path / "mark").exists(), "the bomb of this test does not work"


@WAYS
def test_a_pickle_beside_the_weights_is_not_read(way, folder: Path, tmp_path: Path) -> None:
    torch.save(Bomb(tmp_path / "mark"), folder / "pytorch_model.bin")
    assert way(folder).config.hfslim["version"] == 1
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("setting", [False, None])
def test_its_own_class_cannot_be_told_to_unpickle(setting, folder: Path) -> None:
    with pytest.raises(BlueprintError, match=f"use_safetensors={setting}: .* safetensors only"):
        load_by_its_own_class(folder, use_safetensors=setting)


@WAYS
@pytest.mark.parametrize("trick", ["../{}", "{folder}/../{}", "{parent}/{}", "shards/../../{}"])
def test_shards_outside_the_folder_are_refused(way, trick, folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0].name
    shutil.copy(folder / shard, folder.parent / "stolen.safetensors")
    (folder / "shards").mkdir()
    index = folder / "model.safetensors.index.json"
    name = trick.format("stolen.safetensors", folder=folder, parent=folder.parent)
    index.write_text(index.read_text().replace(f'"{shard}"', f'"{name}"'))
    with pytest.raises(BlueprintError, match=r"stolen\.safetensors: this weight file lies outside"):
        way(folder)


@WAYS
def test_a_folder_may_be_named_from_the_folder_above(way, folder: Path, monkeypatch) -> None:
    (folder.parent / "here").mkdir()
    monkeypatch.chdir(folder.parent / "here")
    assert way(Path("..", folder.name)).config.hfslim["version"] == 1


@WAYS
def test_shards_of_another_kind_are_refused(way, folder: Path, tmp_path: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1].name
    torch.save(Bomb(tmp_path / "mark"), folder / "shard.bin")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(f'"{shard}"', '"shard.bin"'))
    with pytest.raises(BlueprintError, match=r"shard\.bin: .* safetensors only"):
        way(folder)
    assert not (tmp_path / "mark").exists()


def test_links_inside_the_folder_are_followed_as_in_the_hubs_cache(folder: Path) -> None:
    (folder.parent / "blobs").mkdir()
    for file in folder.glob("*.safetensors"):
        file.rename(folder.parent / "blobs" / file.name)
        file.symlink_to(folder.parent / "blobs" / file.name)
    assert load(folder).config.hfslim["version"] == 1


@pytest.mark.parametrize("name", ["modeling_hfslim", "evil"])
def test_code_beside_the_weights_is_not_run_unless_trusted(name, folder: Path) -> None:
    mark = folder / "mark"
    (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = dict.fromkeys(config["auto_map"], f"{name}.SlimBert")
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).config.hfslim["version"] == 1
    assert not mark.exists()


@pytest.mark.parametrize("name", ["SlimPipeline", "Slimlogging", "SlimNothing"])
def test_only_model_classes_are_made_by_name(name: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
        getattr(modeling_hfslim, name)


def test_where_hfslim_is_not_installed_the_same_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    name, shape = next(iter(config["hfslim"]["shapes"].items()))
    config["hfslim"]["shapes"][name] = [10**9] * len(shape)
    (folder / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(folder)],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"BlueprintError: {name!r} cannot get the shape [1000000000" in done.stderr
