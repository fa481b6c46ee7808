"""Recipes are read exactly, and refused with the nearest fix before any work begins."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from hfslim.pipeline.recipe import Recipe, RecipeError, load_recipe
from hfslim.tasks import DataConfig


def raw() -> dict[str, Any]:
    return {
        "task": "text-classification",
        "model": "google-bert/bert-base-uncased",
        "data": {
            "dataset_name": "nyu-mll/glue",
            "dataset_config_name": "sst2",
            "text_column_name": "sentence",
        },
        "metric": "accuracy",
        "output_dir": "outputs",
        "training": {"per_device_train_batch_size": 32, "bf16": True},
        "stages": [
            {"transfer": {"num_train_epochs": 3, "learning_rate": "2e-5"}},
            {"prune": {"target": {"macs": 0.5}, "units": ["heads", "neurons", "layers"]}},
            {"recover": {"num_train_epochs": 2, "temperature": 2, "alpha": 0.9}},
            {"measure": {"batch_sizes": [1, 32]}},
            {"push": {"hub_model_id": "you/bert-sst2-half"}},
        ],
    }


def load(tmp_path: Path, recipe: dict[str, Any], *arguments: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return load_recipe(path, arguments)


def test_a_recipe_becomes_typed_stages(tmp_path: Path) -> None:
    recipe = load(tmp_path, raw())
    assert recipe.data == DataConfig(
        dataset_name="nyu-mll/glue", dataset_config_name="sst2", text_column_name="sentence"
    )
    assert [stage.name for stage in recipe.stages] == [
        "transfer",
        "prune",
        "recover",
        "measure",
        "push",
    ]
    assert recipe.stages[0].settings == {
        "method": "full",
        "unfrozen_at": 0.5,
        "lora_rank": 8,
        "l2_sp": 0.0,
        "training": {"num_train_epochs": 3.0, "learning_rate": 2e-5},
    }
    assert recipe.stages[2].settings["training"]["temperature"] == 2.0


@pytest.mark.parametrize("given", ["dynamic", [[0, 1], [1, 3]], "[[0, 1], [1, 3]]"])
def test_a_layer_map_is_a_name_or_pairs_in_either_form(tmp_path: Path, given: object) -> None:
    recipe = raw()
    recipe["stages"][2]["recover"]["layer_map"] = given
    assert load(tmp_path, recipe).stages[2].settings["training"]["layer_map"] == given


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(raw()).replace("learning_rate: 2e-5", "learning_rate: 2e-5") + "seed: 7\n"
    )
    assert yaml.safe_load("2e-5") == "2e-5"
    rate = load_recipe(path, ["--training.weight_decay", "1e-2"]).training["weight_decay"]
    assert rate == 0.01


def test_a_strategy_of_no_is_not_false(tmp_path: Path) -> None:
    recipe = load(tmp_path, raw(), "--training.save_strategy", "no")
    assert recipe.training["save_strategy"] == "no"


def test_the_command_line_sets_any_key(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        raw(),
        "--training.learning_rate=3e-5",
        "--stages.prune.target.macs",
        "0.4",
        "--data.max_train_samples",
        "100",
        "--stages.measure.batch_sizes",
        "[8]",
    )
    assert recipe.training["learning_rate"] == 3e-5
    assert recipe.stages[1].settings["target"] == {"macs": 0.4}
    assert recipe.data.max_train_samples == 100
    assert recipe.stages[3].settings["batch_sizes"] == (8,)


def test_a_stage_that_comes_twice_goes_by_its_number(tmp_path: Path) -> None:
    twice = raw()
    twice["stages"].insert(3, {"recover": {"num_train_epochs": 1}})
    recipe = load(tmp_path, twice, "--stages.recover.2.num_train_epochs", "5")
    epochs = [stage.settings["training"]["num_train_epochs"] for stage in recipe.stages[2:4]]
    assert epochs == [2, 5]
    with pytest.raises(RecipeError, match=r"there are 2; use one of \['stages.recover.1'"):
        load(tmp_path, twice, "--stages.recover.num_train_epochs", "5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--traning.bf16", "true"], r"traning: unknown key; did you mean 'training'\?"),
        (
            ["--training.learning_rte", "1"],
            r"training\.learning_rte: unknown key; did you mean 'learning_rate'\?",
        ),
        (
            ["--stages.recover.temprature", "1"],
            r"stages\[3\] recover\.temprature: unknown key; did you mean 'temperature'\?",
        ),
        (
            ["--stages.transfer.temperature", "1"],
            r"stages\[1\] transfer\.temperature: unknown key",
        ),
        (["--data.train_fil", "x"], r"data\.train_fil: unknown key; did you mean 'train_file'"),
        (["--stages.prun.seed", "1"], r"no stage 'prun'; did you mean 'prune'"),
        (["--stages", "[prun]"], r"unknown stage 'prun'; did you mean 'prune'"),
        (
            ["--training.per_device_train_batch_size", "1.5"],
            r"per_device_train_batch_size: expected a whole number, got 1\.5",
        ),
        (["--training.bf16", "1"], "bf16: expected true or false, got 1"),
        (["--training.learning_rate", "fast"], "learning_rate: expected a number, got 'fast'"),
        (["--training.lr_scheduler_type", "cosin"], "did you mean 'cosine'"),
        (["--training.output_dir", "x"], "set output_dir at the top"),
        (["--seed", "x"], "seed: expected a whole number, got 'x'"),
        (["--task", "text-clasification"], "did you mean 'text-classification'"),
        (["--metric", "f1"], r"metric: unknown 'f1'; expected one of \[.*'f1_macro'"),
        (["--stages.prune.target.macs", "1.5"], r"fraction to keep, in \(0, 1\]; got 1\.5"),
        (["--stages.prune.target.macs", "0"], r"fraction to keep, in \(0, 1\]; got 0"),
        (["--stages.prune.target", "{macs: .5, parameters: .5}"], "one of"),
        (["--stages.prune.units", "[head]"], r"units\[0\]: unknown 'head'; did you mean 'heads'"),
        (["--stages.prune.criterion", "fischer"], "'fischer', expected one of .*'fisher'"),
        (["--stages.prune.learning_rate", "1e-5"], "need training: add num_train_epochs"),
        (
            ["--stages.prune.criterion", "obs", "--stages.prune.num_train_epochs", "1"],
            r"obs is measured on calibration data, .* in a recipe no schedule, num_train_epochs or "
            r"max_steps, or one of \['fisher'",
        ),
        (
            ["--stages.prune.criterion", "movement"],
            r"movement is measured while training: .*num_train_epochs, or one of \['obs'",
        ),
        (
            ["--stages.prune.reconstruction", "scales", "--stages.prune.max_steps", "9"],
            "'scales' is for a cut in one go",
        ),
        (["--stages.measure.batch_sizes", "[0]"], "batch_sizes must be 1 or more"),
        (["--data.train_file", "x.csv"], "exactly one of dataset_name, train_file"),
        (["--data.dataset_name", "", "--data.train_file", "no.csv"], "no file 'no.csv'"),
        (["--teacher", "./absent"], "teacher: no folder './absent'"),
        (["--model", "null"], "give either model"),
        (["--model.x", "1"], "'model' is 'google-bert/bert-base-uncased', it has no keys"),
        (["--bf16"], "--bf16 needs a value"),
        (["bf16", "true"], "expected --key value, got 'bf16'"),
    ],
)
def test_bad_keys_and_values_are_refused(tmp_path: Path, arguments, message) -> None:
    with pytest.raises(RecipeError, match=message):
        load(tmp_path, raw(), *arguments)


def test_an_unknown_field_of_a_model_config_is_refused(tmp_path: Path) -> None:
    recipe = raw() | {"model": None, "model_config": {"model_type": "vit", "hidden_sise": 32}}
    with pytest.raises(RecipeError, match="vit has no such field; did you mean 'hidden_size'"):
        load(tmp_path, recipe)


@pytest.mark.parametrize(
    ("gradual", "criterion", "reconstruction"),
    [
        ({}, "obs", "weights"),
        ({"schedule": "cubic"}, "fisher", "none"),
        ({"num_train_epochs": 2}, "fisher", "none"),
        ({"max_steps": 9}, "fisher", "none"),
    ],
)
def test_a_cut_in_one_go_is_by_obs_a_gradual_one_by_fisher(
    tmp_path: Path, gradual, criterion, reconstruction
) -> None:
    recipe = raw()
    recipe["stages"][1]["prune"] |= gradual
    stage = load(tmp_path, recipe).stages[1]
    settings = stage.settings
    assert (settings["criterion"], settings["reconstruction"]) == (criterion, reconstruction)
    assert f"by criterion {criterion}, {'gradually' if gradual else 'in one go'}" in str(stage)


def test_distil_needs_a_teacher(tmp_path: Path) -> None:
    recipe = raw() | {"stages": [{"distil": {"num_train_epochs": 1}}]}
    with pytest.raises(RecipeError, match=r"stages\[1\] distil: no teacher"):
        load(tmp_path, recipe)


def test_an_untrained_model_is_not_pruned(tmp_path: Path) -> None:
    recipe = raw() | {"model": None, "model_config": {"model_type": "vit"}}
    recipe["stages"] = recipe["stages"][1:]
    with pytest.raises(RecipeError, match="begin with `transfer` or `distil`"):
        load(tmp_path, recipe)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe"):
        load_recipe(tmp_path / "absent.yaml")


HARMS = [
    (lambda text: text.replace("num_train_epochs: 2", "num_train_epochs: .inf"), "got inf"),
    (lambda text: text.replace("num_train_epochs: 2", "num_train_epochs: 1e999"), "got '1e999'"),
    (lambda text: text.replace("num_train_epochs: 2", "num_train_epochs: .nan"), "got nan"),
    (lambda text: text + f"\nmodel_config: {'[' * 20_000}{']' * 20_000}\n", "nested too deep"),
    (lambda text: text + f"\nseed: {'7' * 5_000}\n", "not valid YAML: .*5000 digits"),
    (lambda text: text + f"\nseed: {'7' * 4_000}\n", r"seed: expected 0 to 4294967295, got 777.*…"),
    (lambda text: text + "\nseed: -1\n", "seed: expected 0 to 4294967295, got -1"),
    (lambda text: text.encode("utf-16"), "not UTF-8: invalid start byte at byte 0"),
    (lambda text: (text + "\n# caf\xe9\n").encode("latin-1"), "not UTF-8"),
    (lambda text: text + "\noutput_dir: there\n", "the key 'output_dir' is there twice, .*line"),
    (lambda text: text.replace("target: {macs: 0.5}", "target: {macs: 0.5, macs: 0.6}"), "twice"),
    (lambda text: text + "\n? [a]\n: b\n", "not valid YAML"),
    (lambda text: text + "\n: : {\n", "not valid YAML"),
    (lambda text: "just words", "expected keys with values, got 'just words'"),
    (lambda text: text.replace("stages:", "stages: 3 #"), "."),
    (lambda text: text.replace("bf16", "bf61"), "unknown key; did you mean 'bf16'"),
]


@pytest.mark.parametrize(("harm", "told"), HARMS)
def test_a_recipe_that_cannot_be_read_is_told_in_one_line_with_its_name(
    tmp_path: Path, harm, told: str
) -> None:
    recipe = raw() | {"training": {"bf16": True}}
    recipe["stages"] = [
        {"transfer": {"num_train_epochs": 2}},
        {"prune": {"target": {"macs": 0.5}, "max_examples": 4}},
    ]
    text = yaml.safe_dump(recipe, default_flow_style=None)
    path, written = tmp_path / "recipe.yaml", harm(text)
    path.write_bytes(written if isinstance(written, bytes) else written.encode())
    assert written != text
    with pytest.raises(RecipeError, match=told) as refused:
        load_recipe(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600


def test_a_value_of_the_command_line_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"^command line: --seed '77.*: not valid YAML: .*5000 dig"
    ):
        load(tmp_path, raw(), "--seed", "7" * 5000)
