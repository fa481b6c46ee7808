"""Each launch configuration: what accelerate makes of it, and which recipes it can run."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from distributed.launch import START
from places import ROOT
from safetensors.torch import load_file

from hfslim.pipeline.launch import check_launch, launch_arguments
from hfslim.pipeline.recipe import load_recipe

CONFIGURATIONS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
WEIGHTS = {"sparse": "recover", "l0": "prune"}
GRADUAL = {**WEIGHTS, "gradual": "prune", "dphubert": "prune"}
FEATURES = {
    **GRADUAL,
    "distilhubert": "recover",
    "distilbert_sst2": "recover",
    "three_layers": "recover",
}
REFUSED = {"DDP": {}, "ZeRO-2": WEIGHTS, "ZeRO-3": GRADUAL, "FSDP": FEATURES}
"""Stage that a way to train cannot run, by a part of the recipe's name."""
TINY = (
    *("recipes/image/digits_vit.yaml", "--training.max_steps", "2"),
    *("--training.disable_tqdm", "true", "--data.max_eval_samples", "64"),
    *("--stages.recover.allow_untrained_teacher", "true", "--stages.prune.max_examples", "64"),
    *("--stages.measure.batch_sizes", "[1]"),
)


def told(path: Path):
    """Return the launcher's arguments with what a configuration says."""
    parser = launch_command_parser()
    known = set(vars(parser.parse_args(["program"])))
    args, defaults, _ = _validate_launch_command(
        parser.parse_args(["--config_file", str(path), "program"])
    )
    # What accelerate does not know it ignores in the sections of a configuration.
    for section in (defaults.deepspeed_config, defaults.fsdp_config):
        unknown = set(section) - known
        assert not unknown, f"{path.name}: {unknown}"
    return args


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_the_launcher_takes_each_configuration(path: Path) -> None:
    args = told(path)
    assert args.use_deepspeed == path.stem.startswith("deepspeed")
    assert args.use_fsdp == (path.stem == "fsdp2")
    assert args.multi_gpu == path.stem.startswith("multi")
    assert args.mixed_precision == ("no" if path.stem.endswith("cpu") else "bf16")
    if args.use_deepspeed:
        assert args.zero_stage == int(path.stem[-1])


@pytest.mark.parametrize("key", ["zero_stages: 3", "deepspeed_config: {zero_stages: 3}"])
def test_a_misspelt_key_of_a_configuration_is_found(key: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(f"distributed_type: DEEPSPEED\nnum_processes: 2\n{key}\n")
    with pytest.raises((ValueError, AssertionError), match="zero_stages"):
        told(path)


def test_fsdp_loads_whole_models_and_wraps_their_layers(monkeypatch) -> None:
    said = prepare_multi_gpu_env(told(ROOT / "accelerate_configs" / "fsdp2.yaml"))
    for name in os.environ.keys() | said.keys():
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert not plugin.cpu_ram_efficient_loading


@pytest.mark.parametrize("way", REFUSED)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_refused_before_it_trains_where_a_stage_cannot_run(
    path: Path, way: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("hfslim.tasks.data.DataConfig.__post_init__", lambda self: None)
    monkeypatch.setattr("hfslim.pipeline.launch.check_fsdp", lambda args: None)
    recipe = load_recipe(path)
    plan = []
    for stage in recipe.stages:
        args = None
        if stage.trains:
            given = launch_arguments({**recipe.training, **stage.settings["training"]})
            args = stage.arguments(str(tmp_path), **given)
        if args and way.startswith("ZeRO"):
            args.deepspeed_plugin = SimpleNamespace(zero_stage=int(way[-1]))
        elif args and way == "FSDP":
            args.fsdp = True
        plan.append((stage, args))
    refused = next((stage for part, stage in REFUSED[way].items() if part in path.stem), None)
    if refused is None:
        check_launch(plan)
        return
    with pytest.raises(ValueError, match=rf"^stages\[\d\] {refused}: .* under {way}: ") as error:
        check_launch(plan)
    assert "launch with accelerate_configs/multi_gpu.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, {"bf16": True}), ({"fp16": True}, {"fp16": True}), ({"bf16": False}, {"bf16": False})],
)
def test_the_launch_says_the_precision_where_a_recipe_does_not(
    given: dict[str, bool], expected: dict[str, bool], monkeypatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    said = launch_arguments(given)
    assert {name: said[name] for name in ("bf16", "fp16") if name in said} == expected


def free_port() -> int:
    """Return a port that is free, and that no connection is given before it is listened on."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("100 ports of 20000 to 29999 are taken")


def machines(*folders: Path, options: tuple[str, ...] = ()) -> list[tuple[int, str]]:
    """Run a recipe by multi_node.yaml, once for each folder, as if on so many machines."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    count = str(len(folders))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += ["accelerate_configs/multi_node.yaml", "--num_processes", count]
    command += ["--num_machines", count, "--main_process_ip", "127.0.0.1"]
    command += ["--main_process_port", str(free_port())]
    logs = [folder.parent / f"{rank}.log" for rank, folder in enumerate(folders)]
    running = []
    for rank, (folder, log) in enumerate(zip(folders, logs, strict=True)):
        own = ["--machine_rank", str(rank), str(START), "recipes/compress.py", *TINY]
        own += ["--output_dir", str(folder), *options]
        with log.open("w") as file:
            running.append(
                subprocess.Popen(
                    [*command, *own], cwd=ROOT, env=environment, stdout=file, stderr=file
                )
            )
    try:
        codes = [process.wait() for process in running]
    finally:
        for process in running:
            process.kill()
    return list(zip(codes, [log.read_text() for log in logs], strict=True))


@pytest.mark.distributed
def test_two_machines_with_folders_of_their_own_end_and_resume_with_the_same_model(
    tmp_path: Path,
) -> None:
    folders = tmp_path / "first", tmp_path / "second"
    options = ("--training.save_on_each_node", "true", "--training.save_strategy", "steps")
    options += ("--training.save_steps", "1")
    ended = machines(*folders, options=options)
    assert [code for code, _ in ended] == [0, 0], ended
    first = load_file(folders[0] / "03-recover" / "model.safetensors")
    # Stopped in the last training, the second machine before it had saved what the first had.
    for folder in folders:
        manifest = json.loads((folder / "manifest.json").read_text())
        for entry in manifest["stages"][2:]:
            entry["finished"] = False
        # The second one had not noted either that the stage before was finished.
        manifest["stages"][1]["finished"] = folder == folders[0]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    lost = folders[1] / "03-recover" / "training" / "checkpoint-2"
    shutil.rmtree(lost)
    ended = machines(*folders, options=options)
    assert [code for code, _ in ended] == [0, 0], ended
    assert lost.is_dir()
    again = load_file(folders[0] / "03-recover" / "model.safetensors")
    assert all(value.equal(again[key]) for key, value in first.items())
    for name in ("01-transfer", "02-prune", "03-recover", "03-recover/training/checkpoint-2"):
        one, other = (load_file(folder / name / "model.safetensors") for folder in folders)
        assert one.keys() == other.keys()
        assert all(value.equal(other[key]) for key, value in one.items())
    assert (folders[0] / "report.md").is_file()
    assert not (folders[1] / "report.md").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("each", [False, True])
def test_machines_are_told_where_their_folder_is_not_shared_as_they_say(
    each: bool, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in (("same", "same") if each else ("one", "other"))]
    ended = machines(*folders, options=("--training.save_on_each_node", str(each).lower()))
    for code, said in ended:
        assert code == 1
        assert ("share" if each else "do not share") + f" {tmp_path}" in said
        assert "save_on_each_node" in said
    assert not [path for folder in folders for path in folder.iterdir()]
