"""The repository keeps what its README and its package metadata promise."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(line)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in group
]
README = (ROOT / "README.md").read_text(encoding="utf-8")
README_PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): pinned for name, pinned in pairs}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_the_tested_set_pins_each_requirement_within_its_range(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_pins_are_plain_versions_from_any_index() -> None:
    assert [pin for pin in pins().values() if not re.fullmatch(r"\d+(\.\d+)*", pin)] == []


@pytest.mark.parametrize("line", PROJECT["dependencies"])
def test_the_tests_run_on_the_tested_set(line: str) -> None:
    name = Requirement(line).name
    assert version(name).split("+")[0] == pins()[canonicalize_name(name)]


def test_each_make_command_of_the_readme_is_a_documented_target() -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    listing = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {"quickstart", "test"} <= named
    assert named <= set(re.findall(r"make (\S+)", listing))


def test_importing_the_package_loads_none_of_its_heavy_parts() -> None:
    heavy = [
        "hfslim.measuring",
        "hfslim.reporting.report",
        "hfslim.distillation",
        "datasets",
        "rich",
        "sklearn",
    ]
    loaded = subprocess.run(
        [sys.executable, "-c", "import hfslim, sys; print(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "hfslim" in loaded
    assert set(heavy) & set(loaded) == set()


@pytest.mark.parametrize("block", README_PYTHON, ids=lambda block: block.splitlines()[0])
def test_the_python_of_the_readme_compiles(block: str) -> None:
    compile(block, "README.md", "exec")


SPOKEN_OF = sorted(
    {
        (name, str(path.relative_to(ROOT)))
        for pattern in ("*.md", "docs/*.md", "recipes/*.md", "hfslim/**/*.py", "hfslim/**/*.jinja")
        for path in ROOT.glob(pattern)
        if path.name != "CHANGELOG.md"
        for name in re.findall(r"(?<![\w./-])hfslim(?:\.[A-Za-z_]\w*)+", path.read_text("utf-8"))
        if not name.endswith(".py")
    }
)


@pytest.mark.parametrize("name", sorted({name for name, _ in SPOKEN_OF}))
def test_each_dotted_name_in_documents_and_messages_exists(name: str) -> None:
    places = [place for other, place in SPOKEN_OF if other == name]
    value, path = importlib.import_module("hfslim"), "hfslim"
    for part in name.split(".")[1:]:
        path += f".{part}"
        if not hasattr(value, part):
            try:
                importlib.import_module(path)
            except ImportError:
                pytest.fail(f"{places} speak of {name}, and there is no {path}")
        value = getattr(value, part)


@pytest.mark.slow
def test_an_editable_install_is_found_from_the_folder_above_a_clone(tmp_path: Path) -> None:
    """A clone called hfslim is a namespace package there, unless the install is by path."""
    ignore = shutil.ignore_patterns(".git", ".venv*", "outputs", "shared", "data", ".*_cache")
    shutil.copytree(ROOT, tmp_path / "hfslim", ignore=ignore)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "-e", "hfslim"]
    subprocess.run(install, cwd=tmp_path, check=True)
    code = "import hfslim; print(hfslim.__file__, 'prune' in dir(hfslim))"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert found.stdout.split() == [str(tmp_path / "hfslim/hfslim/__init__.py"), "True"]


def test_an_editable_install_is_by_path() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == {"": "."}


def test_the_package_keeps_its_shape() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "shape.py")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
