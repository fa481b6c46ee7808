"""The benchmark against other methods: equal terms, results that last, tables that match them."""

import copy
import json
import re
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

import benchmarks.rivals.__main__ as command
import hfslim
from benchmarks import tables
from benchmarks.rivals import depgraph
from benchmarks.rivals import tables as rivals
from benchmarks.rivals.cells import recover
from benchmarks.rivals.data import RememberedTeacher, Setting, Task
from benchmarks.rivals.methods import METHODS, PLACEMENTS
from benchmarks.rivals.problem import Problem, score
from benchmarks.rivals.results import Results
from hfslim.anatomy.inputs import example_inputs
from hfslim.pipeline.recipe import load_recipe

RECIPE = str(Path(__file__).resolve().parent.parent / "recipes/image/digits_vit.yaml")
VIT = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def problem(model: PreTrainedModel, examples: int = 6) -> Problem:
    batch = {
        **example_inputs(model, examples),
        "labels": torch.arange(examples) % model.config.num_labels,
    }
    return Problem(model.eval(), [batch], example_inputs(model), seed=0)


@pytest.mark.parametrize("family", ["bert", "vit", "whisper"])
@pytest.mark.parametrize(
    "setting",
    [
        "taylor, global, heads, inside layers",
        "hessian, isomorphic, head sizes, inside layers",
        "magnitude, uniform, heads, hidden size",
        "taylor, uniform, head sizes, hidden size",
    ],
)
def test_torch_pruning_meets_the_budget_and_leaves_the_teacher_alone(
    family: str, setting: str
) -> None:
    task = problem(tiny(family, attention="sdpa"))
    before = {name: tensor.clone() for name, tensor in task.teacher.state_dict().items()}
    cut = METHODS["torch-pruning"][setting](task, 0.6)
    assert 0.35 < task.kept(cut) <= 0.6
    assert cut(**task.inputs).logits.shape == (1, 3)
    assert all(torch.equal(before[name], t) for name, t in task.teacher.state_dict().items())


def test_torch_pruning_keeps_the_hidden_size_where_it_cuts_inside_layers() -> None:
    task = problem(tiny("bert", attention="sdpa"))
    widths = {
        width: METHODS["torch-pruning"][f"magnitude, uniform, heads, {width}"](task, 0.5)
        .get_submodule("classifier")
        .in_features
        for width in ("inside layers", "hidden size")
    }
    assert widths["hidden size"] < widths["inside layers"] == 32


def test_the_hessian_averages_squared_gradients_over_all_examples() -> None:
    task = problem(tiny("vit"), examples=3)
    scored = depgraph.score_weights(task, "hessian")
    path = "vit.layers.1.mlp.fc1.weight"
    weight = task.teacher.get_parameter(path)
    (batch,) = task.calibration
    squares = []
    for row in range(3):
        example = {name: value[row : row + 1] for name, value in batch.items()}
        (gradient,) = torch.autograd.grad(task.teacher(**example).loss, weight)
        squares.append(gradient**2)
    names = [name for name, _ in task.teacher.named_parameters()]
    torch.testing.assert_close(scored.gradients[names.index(path)], sum(squares) / 3)


def test_layers_are_kept_where_their_placement_says() -> None:
    kept = {name: placement(6, 3) for name, placement in PLACEMENTS.items()}
    assert kept == {
        "evenly, first and last kept": [0, 2, 5],
        "evenly, from the first on": [0, 2, 4],
        "the first": [0, 1, 2],
    }


@pytest.mark.parametrize(("budget", "layers"), [(0.5, 2), (0.7, 3), (0.05, 1), (1.0, 4)])
def test_layer_removal_keeps_the_depth_nearest_to_the_budget(budget: float, layers: int) -> None:
    task = problem(tiny("vit", num_hidden_layers=4))
    cut = METHODS["layers"]["the first"](task, budget)
    assert cut.config.num_hidden_layers == layers


@pytest.mark.parametrize("family", ["bert", "vit", "whisper"])
def test_a_small_student_is_new_narrower_and_within_the_budget(family: str) -> None:
    task = problem(tiny(family))
    student = METHODS["small student"]["narrow"](task, 0.5)
    assert 0.4 < task.kept(student) <= 0.5
    whole, small = ({s.path: s.size for s in hfslim.find_units(m)} for m in (task.teacher, student))
    assert all(small[path] <= size for path, size in whole.items())
    trained, fresh = (m.get_submodule("classifier").weight for m in (task.teacher, student))
    assert trained.shape == fresh.shape
    assert not torch.allclose(trained, fresh)


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_even_cuts_keep_the_best_of_each_layer_as_they_were(criterion: str) -> None:
    task = problem(tiny("bert"))
    cut = METHODS[criterion]["evenly in all layers"](task, 0.5)
    assert 0.4 < task.kept(cut) <= 0.5
    for name, weight in cut.named_parameters():
        if name.endswith("intermediate.dense.weight"):
            whole = task.teacher.get_parameter(name)
            out = task.teacher.get_parameter(name.replace("intermediate", "output"))
            bias = task.teacher.get_parameter(name.replace("weight", "bias"))
            size = whole.square().sum(1) + out.square().sum(0) + bias.square()
            best = size.topk(len(weight)).indices.sort().values
            assert torch.equal(weight, whole[best]) == (criterion == "magnitude")
            assert all((whole == row).all(1).any() for row in weight)
    assert len({site.size for site in hfslim.find_units(cut).of(["neurons"])}) == 1


def test_labels_alone_leave_the_teacher_out(teacher: str) -> None:
    setting = Setting(RECIPE, train=192, evaluation=8, calibration=16, selection=16)
    task = Task.prepare("digits", setting, load_recipe(RECIPE), teacher)
    other = replace(task, remembered=RememberedTeacher(task.teacher.config, torch.randn(192, 10)))
    heads = {}
    for taught in (True, False):
        for name, one in (("teacher", task), ("noise", other)):
            model = copy.deepcopy(task.teacher)
            recover(one, model, 0, taught)
            heads[taught, name] = model.get_submodule("classifier").weight.detach()
    assert torch.equal(heads[False, "teacher"], heads[False, "noise"])
    assert not torch.allclose(heads[True, "teacher"], heads[True, "noise"])


def test_a_score_weighs_every_example_the_same_whatever_the_batches() -> None:
    task = problem(tiny("vit"), examples=6)
    (batch,) = task.calibration
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 5), slice(5, 6))]
    whole, split = score(task.teacher, [batch]), score(task.teacher, parts)
    assert split.accuracy == whole.accuracy
    assert split.loss == pytest.approx(whole.loss, rel=1e-5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained classifier of the digits, in a folder with its processor."""
    folder = tmp_path_factory.mktemp("teacher")
    names = {number: str(number) for number in range(10)}
    config = AutoConfig.for_model("vit", **VIT, id2label=names)
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def arguments(teacher: str, output: Path, *more: str) -> list[str]:
    sizes = {"train": 192, "evaluation": 20, "calibration": 16, "selection": 64}
    given = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    chosen = ["--methods", "hfslim", "layers", "--budgets", "0.5", "--seeds", "0"]
    return ["digits", "--teacher", teacher, "--output", str(output), *given, *chosen, *more]


@pytest.fixture(scope="module")
def finished(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one budget and seed."""
    output = tmp_path_factory.mktemp("results") / "digits.json"
    command.main(arguments(teacher, output, "--epochs", "1"))
    return output


def test_a_run_writes_a_cell_for_each_method(finished: Path) -> None:
    data = json.loads(finished.read_text())
    assert [cell["method"] for cell in data["cells"]] == ["hfslim", "layers"]
    for cell in data["cells"]:
        assert 0.4 < cell["macs"] < 0.6
        assert [one["batch"] for one in cell["latency"]] == [1, 32]
        assert cell["after"]["loss"] != cell["before"]["loss"]
    assert data["runs"][0]["torch"] == version("torch")
    (choice,) = data["choices"]
    assert len(choice["tried"]) == 3
    best = max(choice["tried"], key=lambda one: (one["accuracy"], -one["loss"]))
    assert choice["setting"] == best["setting"]


def test_a_second_run_skips_what_is_finished(
    finished: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a finished cell was run again")

    before = json.loads(finished.read_text())
    monkeypatch.setattr(command, "run_cell", refuse)
    command.main(arguments(teacher, finished, "--epochs", "1"))
    assert json.loads(finished.read_text())["cells"] == before["cells"]


def test_results_of_other_settings_are_not_mixed(finished: Path, teacher: str) -> None:
    before = finished.read_text()
    with pytest.raises(SystemExit, match="give another --output"):
        command.main(arguments(teacher, finished, "--epochs", "2"))
    assert finished.read_text() == before


def test_recovery_and_selection_share_no_example(teacher: str) -> None:
    setting = Setting(RECIPE, train=40, evaluation=8, calibration=16, selection=40)
    task = Task.prepare("digits", setting, load_recipe(RECIPE), teacher)

    def digests(rows: torch.Tensor) -> set[float]:
        return {float(row.double().abs().sum()) for row in rows}

    train = digests(torch.stack([row["pixel_values"] for row in task.train]))
    selection = digests(torch.cat([batch["pixel_values"] for batch in task.selection]))
    calibration = digests(torch.cat([b["pixel_values"] for b in task.problem(3).calibration]))
    assert len(train) == len(selection) == 40
    assert not train & selection
    assert calibration < train


def test_rounding_of_a_teachers_loss_is_no_other_setting(tmp_path: Path) -> None:
    results = Results(tmp_path / "some.json")
    results.begin({"teacher": {"accuracy": 0.5, "loss": 0.123456789}})
    results.begin({"teacher": {"accuracy": 0.5, "loss": 0.123456799}})
    with pytest.raises(SystemExit, match="give another --output"):
        results.begin({"teacher": {"accuracy": 0.501, "loss": 0.123456789}})


def test_only_settings_that_are_asked_for_are_tried(teacher: str, tmp_path: Path) -> None:
    output = tmp_path / "digits.json"
    command.main(arguments(teacher, output, "--methods", "layers", "--settings", "evenly"))
    (choice,) = json.loads(output.read_text())["choices"]
    assert [one["setting"] for one in choice["tried"]] == list(PLACEMENTS)[:2]


def test_results_are_kept_when_two_processes_finish_the_same_cell(tmp_path: Path) -> None:
    results = Results(tmp_path / "some.json")
    results.begin({"name": "text"})
    for value in (1, 2):
        results.add("cells", {"method": "hfslim", "budget": 0.5, "seed": 0, "value": value})
    assert [cell["value"] for cell in results.read()["cells"]] == [1]


def cell(method: str, budget: float, seed: int, before: float, after: float) -> dict[str, Any]:
    return {
        "method": method,
        "budget": budget,
        "seed": seed,
        "run": 0,
        "macs": budget,
        "parameters": 0.7,
        "cut_seconds": 3.4,
        "before": {"accuracy": before, "loss": 1.0},
        "after": {"accuracy": after, "loss": 1.0},
    }


def test_a_table_gives_mean_and_sample_deviation_over_seeds() -> None:
    latency = {"batch": 1, "speedup": 1.5, "low": 1.4, "high": 1.625}
    cells = [
        cell("layers", 0.5, 0, 0.5, 0.6),
        {**cell("hfslim", 0.5, 0, 0.70, 0.80), "latency": [latency], "cut_bytes": 7 * 2**20},
        cell("hfslim", 0.5, 1, 0.72, 0.80),
        cell("hfslim", 0.5, 2, 0.74, 0.80),
    ]
    data = {
        "name": "text",
        "setting": {
            "recipe": "r.yaml",
            "evaluation": 9,
            "calibration": 8,
            "train": 7,
            "epochs": 1,
        },
        "recovery": {"learning_rate": 1e-4},
        "teacher": {"accuracy": 0.9, "parameters": 1_000_000, "macs": 2_000_000},
        "runs": [{"date": "2026-01-01", "commit": "abc", "torch": "2"}],
        "choices": [],
        "cells": cells,
    }
    rows = [line for line in tables.render(data).splitlines() if line.startswith("| 0.5 ")]
    assert rows == [
        "| 0.5 | hfslim | 0.500 | 0.700 | 72.0 ± 2.0 | 80.0 ± 0.0 | 1.50 (1.40–1.62) | 3 s | "
        "7 MiB |",
        "| 0.5 | layers | 0.500 | 0.700 | 50.0 | 60.0 | – | 3 s | – |",
    ]


def test_leads_are_over_the_best_other_method_beside_the_greater_spread() -> None:
    wide = [cell("magnitude", 0.5, seed, 0.60, after) for seed, after in enumerate((0.78, 0.82))]
    low = [cell("layers", 0.5, seed, 0.62, 0.70) for seed in (0, 1)]
    own = [cell("hfslim", 0.5, seed, before, 0.81) for seed, before in enumerate((0.69, 0.71))]
    (row,) = rivals.leads([{"name": "text", "cells": [*wide, *low, *own]}]).splitlines()[2:]
    # 70 ± 1.4 against 62 ± 0; 81 ± 0 against 80 ± 2.8.
    assert row.split(" | ")[1:] == [
        "0.5",
        "+8.0 (spread 1.4), layers",
        "*+1.0 (spread 2.8), magnitude* |",
    ]


def test_the_headline_shows_time_and_accuracy_beside_the_best_other_method() -> None:
    def cells(method: str, *after: float) -> list[dict[str, Any]]:
        latency = [{"batch": 1, "speedup": 3.0}, {"batch": 32, "speedup": 1.5}]
        return [
            {"budget": 0.5, "method": method, "before": {"accuracy": one - 0.1}}
            | {"after": {"accuracy": one}, "latency": latency}
            for one in after
        ]

    data = {
        "name": "text",
        "teacher": {"accuracy": 0.9},
        "cells": [*cells("hfslim", 0.8, 0.9), *cells("layers", 0.7), *cells("magnitude", 0.75)],
    }
    (row,) = rivals.headline([data], [0.5]).splitlines()[2:]
    shown = [cell.strip() for cell in row.strip("|").split("|")]
    assert shown[1:] == ["50 %", "**1.50 ×**", "90.0", "75.0", "**85.0**", "75.0 (magnitude)"]


def test_what_the_page_says_of_the_leads_is_so() -> None:
    covered = []
    for name in ("text", "image", "resnet", "speech"):
        for line in rivals.leads([tables.read(f"{name}.json")]).splitlines()[2:]:
            _, budget, *cells = (part.strip() for part in line.strip("|").split("|"))
            for when, told in zip(("before", "after"), cells, strict=True):
                if float(budget) <= 0.5:
                    assert told.lstrip("*").startswith("+"), (name, budget, when, told)
                    covered += [(name, budget, when)] if told.startswith("*") else []
    assert covered == [("image", "0.5", "after")]


def test_the_tables_of_the_pages_match_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    pages = "".join(page.read_text() for page in tables.PAGES)
    places = re.findall(r"<!-- results: (\S+) -->", pages)
    assert set(places) >= {file.name for file in tables.RESULTS.glob("*.json")}
    for several in tables.SEVERAL:
        assert f"<!-- {several}: text.json image.json resnet.json speech.json -->" in pages
    tables.main()


@pytest.mark.parametrize("which", [0, 1])
def test_a_page_that_differs_from_the_results_is_told(
    which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    text = tables.PAGES[which].read_text()
    changed = text.replace("<!-- end -->", "| 0.5 | hfslim |\n<!-- end -->", 1)
    page.write_text(changed)
    monkeypatch.setattr(tables, "PAGES", [page])
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    with pytest.raises(SystemExit, match="differs"):
        tables.main()
    assert page.read_text() == changed


def test_every_file_of_results_names_hardware_versions_seeds_and_date() -> None:
    for file in tables.RESULTS.glob("*.json"):
        data = json.loads(file.read_text())
        for cell in data["cells"]:
            assert isinstance(cell["seed"], int)
            run = data["runs"][cell["run"]]
            assert run.keys() >= {"date", "commit", "cpu", "threads", "python", "torch"}
