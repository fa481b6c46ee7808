"""Every shipped recipe is valid, and what it ships with works."""

import csv
import gzip
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import yaml
from distributed.launch import START
from places import ROOT

from hfslim.pipeline.recipe import RecipeError, load_recipe, parse_recipe

RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
LOCAL = {
    "tweets_minilm": ["tweets/train.csv", "tweets/validation.csv"],
    "tweets_minilm_gradual": ["tweets/train.csv", "tweets/validation.csv"],
    "tweets_minilm_l0": ["tweets/train.csv", "tweets/validation.csv"],
    "tweets_minilm_sparse": ["tweets/train.csv", "tweets/validation.csv"],
    "tweets_narrow": ["tweets/train.csv", "tweets/validation.csv"],
    "tweets_three_layers": ["tweets/train.csv", "tweets/validation.csv"],
    **{
        f"fashion_mnist_{name}": ["fashion-mnist/train.parquet", "fashion-mnist/validation.parquet"]
        for name in ("vit", "resnet", "convnext")
    },
    "prompts_whisper": ["prompts/train/en/a.wav", "prompts/validation/en/b.wav"],
}
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def script(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True
    )


def places(source: Path, output: Path) -> list[str]:
    return ["--source", str(source), "--output", str(output)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_is_valid(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for name in LOCAL.get(path.stem, ()):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    recipe = load_recipe(path)
    assert recipe.output_dir == f"outputs/{path.stem}"
    assert recipe.stages[-1].name == "measure"
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("stem", LOCAL)
def test_a_local_recipe_without_its_data_says_what_is_missing(
    stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    path = next(path for path in RECIPES if path.stem == stem)
    with pytest.raises(RecipeError, match=r"data: train_(file|dir): no (file|folder) 'data/"):
        load_recipe(path)


def test_each_recipe_has_its_command_in_the_readme() -> None:
    readme = (ROOT / "recipes" / "README.md").read_text()
    named = [str(path.relative_to(ROOT)) for path in RECIPES]
    assert [name for name in named if name not in readme] == []


def test_each_launch_config_names_its_processes() -> None:
    for path in (ROOT / "accelerate_configs").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        assert (config["num_processes"] == 1) == (config["distributed_type"] == "NO"), path.name


def test_the_launcher_refuses_a_wrong_key_in_one_line(tmp_path: Path) -> None:
    done = script("recipes/compress.py", "recipes/image/digits_vit.yaml", "--trainin.bf16", "true")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("trainin: unknown key; did you mean 'training'?")
    assert "Traceback" not in done.stderr


def test_tweets_are_split_without_a_text_on_both_sides(tmp_path: Path) -> None:
    rows = [("negative", f"text {i % 40}") for i in range(60)]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("sentiment", "text"), *rows])
    target = tmp_path / "out"
    done = script("recipes/prepare_data.py", "tweets", *places(tmp_path, target))
    assert done.returncode == 0, done.stderr
    sides = [
        {row["text"] for row in csv.DictReader((target / f"{name}.csv").open())}
        for name in ("train", "validation")
    ]
    assert len(sides[0]) + len(sides[1]) == 40
    assert sides[0].isdisjoint(sides[1])
    assert sides[1]


def test_prompts_of_one_name_are_on_one_side_in_every_language(tmp_path: Path) -> None:
    for voice in ("en_US_f_A", "fr_CA_f_B"):
        for i in range(30):
            folder = tmp_path / "sounds" / voice / "digits"
            folder.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / f"{i}.wav", np.zeros(80), 8000)
    target = tmp_path / "out"
    done = script("recipes/prepare_data.py", "prompts", *places(tmp_path / "sounds", target))
    assert done.returncode == 0, done.stderr
    sides = {
        (side, language): {p.name for p in (target / side / language).iterdir()}
        for side in ("train", "validation")
        for language in ("en", "fr")
    }
    assert sides["train", "en"] == sides["train", "fr"]
    assert sides["validation", "en"] == sides["validation", "fr"]
    assert len(sides["train", "en"]) + len(sides["validation", "en"]) == 30
    assert sides["train", "en"].isdisjoint(sides["validation", "en"])


def test_fashion_mnist_keeps_pixels_and_names(tmp_path: Path) -> None:
    pixels = np.arange(2 * 784, dtype=np.uint8).reshape(2, 28, 28)
    for stem in ("train", "t10k"):
        with gzip.open(tmp_path / f"{stem}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + pixels.tobytes())
        with gzip.open(tmp_path / f"{stem}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes(8) + bytes([9, 0]))
    done = script("recipes/prepare_data.py", "fashion-mnist", *places(tmp_path, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    rows = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "out" / "validation.parquet"), split="train"
    )
    assert np.array_equal(np.asarray(rows[1]["image"].convert("L")), pixels[1])
    assert rows.features["label"].int2str(rows["label"]) == ["Ankle-boot", "T-shirt/top"]


@pytest.mark.distributed
def test_two_processes_run_the_quickstart_to_its_report(tmp_path: Path) -> None:
    done = script(
        *("-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/multi_cpu.yaml"),
        *("--main_process_port", "0", str(START)),
        *("recipes/compress.py", "recipes/image/digits_vit.yaml"),
        *("--output_dir", str(tmp_path / "out"), "--training.disable_tqdm", "true"),
        *("--training.max_steps", "2", "--data.max_eval_samples", "64"),
        *("--stages.recover.allow_untrained_teacher", "true"),
        *("--stages.prune.max_examples", "64", "--stages.measure.batch_sizes", "[1]"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "04-measure" / "report.md").is_file()
    assert done.stderr.count("stage 2 of 4, prune: accuracy") == 1


@pytest.mark.distributed
@pytest.mark.parametrize(("config", "processes"), [("cpu", 1), ("multi_cpu", 2)])
def test_the_cpu_configurations_start_as_many_processes_as_they_say(
    config: str, processes: int, tmp_path: Path
) -> None:
    """Processes that know of each other, that is: a sum over them counts them."""
    program = tmp_path / "count.py"
    program.write_text(
        "from pathlib import Path\n"
        "import torch\n"
        "from transformers import TrainingArguments\n"
        "from hfslim.pipeline.task_examples import uses_cpu\n"
        f"args = TrainingArguments({str(tmp_path)!r}, use_cpu=uses_cpu())\n"
        "count = torch.ones(())\n"
        "if args.world_size > 1:\n"
        "    torch.distributed.all_reduce(count)\n"
        "here = Path(__file__).with_name(f'rank{args.process_index}')\n"
        "here.write_text(f'{args.world_size} {int(count)}')\n"
    )
    path = f"accelerate_configs/{config}.yaml"
    launcher = ("-m", "accelerate.commands.launch", "--config_file", path)
    done = script(*launcher, "--main_process_port", "0", str(START), str(program))
    assert done.returncode == 0, done.stderr[-3000:]
    told = {path.name: path.read_text() for path in tmp_path.glob("rank*")}
    assert told == {f"rank{rank}": f"{processes} {processes}" for rank in range(processes)}
