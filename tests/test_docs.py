"""Each command and program in the documentation is checked, and those marked `run` are run.

A block that begins with ```bash run or ```python run is run as it stands, offline, in a folder
where tiny models and data go by the names that the pages use (`stand_ins`). The blocks of a page
run in order: its programs share their variables, its commands the folder. ```yaml run writes a
recipe, to the file that its first line names. Other bash, python and yaml blocks are checked:
verbs, options, recipes and their keys, make targets, files, extras, the names and arguments of
hfslim. `docs/hub.md` runs beside a Hub on this machine, where `you` are logged in.
"""

import ast
import importlib
import inspect
import io
import os
import re
import subprocess
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer
from hub_environment import environment
from hub_server import serve
from pages import ROOT, Block, blocks, commands, run_page
from standins import (
    image_folder,
    image_model,
    speech_folder,
    speech_model,
    text_data,
    text_file,
    text_model,
)

import hfslim
from hfslim.cli import app
from hfslim.pipeline.recipe import load_recipe

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(ROOT / folder / "README.md" for folder in ("recipes", "benchmarks")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
ELSEWHERE = (
    "apt",
    "cd",
    "git",
    "source",
    "export",
    ".venv/bin/pre-commit",
    "docker",
    "tensorboard",
)
VERBS = typer.main.get_command(app).commands


CHECKED = ("bash", "python", "yaml")
BLOCKS = [block for page in PAGES for block in blocks(page) if block.language in CHECKED]


def is_template(words: list[str]) -> bool:
    """Tell a form to fill in, such as `hfslim run RECIPE [--key value …]`, from a command."""
    return any("…" in word or re.fullmatch(r"\[?[A-Z_/]{4,}(\.\w+)?\]?", word) for word in words)


def written(page: Path) -> list[str]:
    """Return the names of the recipes that a page tells to write."""
    made = (block for block in BLOCKS if block.page == page and block.language == "yaml")
    return [block.text.splitlines()[0].removeprefix("# ") for block in made if block.runs]


def check_command(words: list[str], folder: Path, page: Path) -> None:
    program, *rest = words
    if program == "hfslim":
        if rest and rest[0] in VERBS:
            if rest[0] in ("report", "card", "push"):
                (folder / rest[1]).mkdir(parents=True, exist_ok=True)
            VERBS[rest[0]].make_context(rest[0], rest[1:])
        else:
            assert rest in (["--help"], ["--version"], ["--install-completion"]), words
        if rest[0] == "run" and rest[1] not in written(page):
            check_recipe(rest[1:], folder)
    elif program == "accelerate":
        assert rest[0] == "launch", words
        script = next(i for i, word in enumerate(rest) if word.endswith(".py"))
        assert all((ROOT / w).is_file() for w in rest[: script + 1] if "/" in w), words
        if rest[script] == "recipes/compress.py":
            check_recipe(rest[script + 1 :], folder)
    elif program in ("python", "python3", ".venv/bin/python"):
        assert rest[0].startswith("-") or (ROOT / rest[0]).is_file(), f"no file {rest[0]}"
    elif program == "make":
        assert [w for w in rest if "=" not in w and w not in TARGETS] == [], words
    elif program == "pip":
        extras = re.findall(r"hfslim\[([\w,]+)\]|\.\[([\w,]+)\]", " ".join(rest))
        named = {name for pair in extras for group in pair for name in group.split(",") if name}
        assert named <= set(PROJECT["optional-dependencies"]), words
    else:
        assert program in ELSEWHERE, f"{program!r}: teach tests/test_docs.py, or mark it ```text"


def check_recipe(arguments: list[str], folder: Path) -> None:
    """Read a recipe as the command would, in a folder that has the files it names."""
    path = ROOT / arguments[0]  # itself, where it is absolute
    assert path.is_file(), f"no recipe {arguments[0]}"
    read = r"(?:train|validation|test)_(?:file|dir):\s*([^\s,}]+)"
    for name in re.findall(read, path.read_text()):
        place = folder / name
        if "://" not in name and not place.exists():
            is_file = bool(place.suffix)
            (place.parent if is_file else place).mkdir(parents=True, exist_ok=True)
            if is_file:
                place.touch()
    context = VERBS["run"].make_context("run", [word.replace("$", "s") for word in arguments])
    load_recipe(path, context.args)


def resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    """Return the object of hfslim that an expression names, or None."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolve(node.value, names)
        if owner is None:
            return None
        assert hasattr(owner, node.attr), f"{owner} has no {node.attr!r}"
        # What a call gives is not known, so neither are its attributes.
        return getattr(owner, node.attr)
    return None


def check_program(text: str) -> None:
    """Check that a program compiles, and that what it takes from hfslim exists and fits."""
    tree = ast.parse(text)
    names: dict[str, Any] = {"hfslim": hfslim}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hfslim":
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name!r}"
                names[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and callable(made := resolve(node.func, names)):
            taken = inspect.signature(made).parameters
            if all(one.kind is not one.VAR_KEYWORD for one in taken.values()):
                given = [keyword.arg for keyword in node.keywords if keyword.arg]
                assert [name for name in given if name not in taken] == [], ast.unparse(node)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_each_block_is_valid(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    if block.language == "python":
        check_program(block.text)
        return
    if block.language == "yaml":
        (tmp_path / "recipe.yaml").write_text(block.text)
        check_recipe([str(tmp_path / "recipe.yaml")], tmp_path)
        return
    for words in commands(block.text):
        if not is_template(words):
            check_command(words, tmp_path, block.page)


def stand_ins(folder: Path) -> None:
    """Make tiny models and data under the names that the pages use."""
    text_model(folder / "textattack" / "bert-base-uncased-SST-2", length=128)
    text_data(folder / "nyu-mll" / "glue", "sst2")
    for name, rows in (("train", 16), ("validation", 8)):
        path = text_file(folder / "data" / "reviews" / f"{name}.csv", rows)
        path.write_text(path.read_text().replace("text,label", "review,verdict"))
    image_model(folder / "digits-vit")
    speech_model(folder / "commands-wav2vec2")
    image_folder(folder / "data" / "images" / "train", tuple("0123456789"))
    image_folder(folder / "data" / "images" / "validation", tuple("0123456789"), each=2)
    speech_folder(folder / "data" / "recordings" / "train")
    speech_folder(folder / "data" / "recordings" / "validation", each=2)
    for name in ("recipes", "accelerate_configs", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(block.runs for block in BLOCKS if block.page == page)],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_what_is_marked_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins(tmp_path)
    if page.name == "hub.md":
        run_beside_a_hub(page, tmp_path)
        return
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            run_page(page)
    except AssertionError:
        print(printed.getvalue(), file=sys.stderr)
        raise


def run_beside_a_hub(page: Path, folder: Path) -> None:
    """Run a page in a process of its own, since the Hub's address is read at import."""
    with serve(you="hf_you") as hub:
        env = environment(hub, folder / "home", "hf_you")
        env |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))}
        command = [sys.executable, str(ROOT / "tests" / "support" / "pages.py"), str(page)]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_within_the_repository_is_broken(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    local = [a or b for a, b in targets if "://" not in (a or b)]
    broken = []
    for target in local:
        name, _, anchor = target.partition("#")
        place = page.parent / name if name else page
        headings = (
            re.findall(r"^#+ (.*)$", place.read_text(), re.M) if place.suffix == ".md" else []
        )
        anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
        if not place.exists() or (anchor and anchor not in anchors):
            broken.append(target)
    assert broken == []
