"""Every verb does what its help says, and tells a mistake in one line with its exit code."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from hub_environment import environment
from hub_server import Hub, serve
from places import ROOT
from safetensors.torch import save_file
from standins import image_model, text_file, text_model

from hfslim.cli import main, options
from hfslim.cli.command import VERBS
from hfslim.pruning import CRITERIA
from hfslim.pruning.target import RESOURCES
from hfslim.tasks import METRICS


class Done:
    """What a command printed, and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    text_model(folder / "model")
    text_model(folder / "other", seed=1)
    image_model(folder / "vit")
    text_file(folder / "train.csv", rows=16)
    text_file(folder / "held.csv", rows=10)
    (folder / "empty").mkdir()
    shutil.copytree(folder / "model", folder / "described")
    (folder / "described/README.md").write_text("# Our own text")
    return folder


@pytest.fixture
def hfslim(shared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(shared)

    def call(*arguments: str) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        printed = capsys.readouterr()
        return Done(ended.value.code or 0, printed.out, printed.err)

    return call


DATA = ("--data", "train.csv", "--data", "validation_file=held.csv", "--data", "max_seq_length=16")
QUICK = ("--calls", "1", "--batch-size", "2")


def test_help_is_there_before_anything_heavy_is_loaded() -> None:
    code = (
        "import sys; from hfslim.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    )
    code += "print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "inspect" in done.stdout
    assert loaded & {"torch", "transformers", "datasets", "numpy"} == set()


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_each_verb_has_an_example(hfslim, verb: str) -> None:
    done = hfslim(verb, "--help")
    assert done.code == 0
    assert f"Example: hfslim {verb}" in done.out


def test_the_help_lists_the_verbs_in_the_order_of_the_work(hfslim) -> None:
    listed = re.findall(r"^│ (\w+) ", hfslim("--help").out.split("Commands")[1], re.MULTILINE)
    assert listed == [
        *("run", "inspect", "prune", "measure", "compare"),
        *("report", "export", "card", "push", "families"),
    ]


EARLY = {
    "a target": (("prune", "model", "--target", "mac=0.5"), "did you mean 'macs'?"),
    "two targets": (("prune", "model", "--target", "macs=1", "--target", "latency=1"), "one of"),
    "a fraction": (("prune", "model", "--target", "macs=5"), "in (0, 1]"),
    "a share": (("prune", "model", "--target", "sparsity.heads=1"), "in [0, 1)"),
    "a kind": (("prune", "model", "--target", "sparsity.haeds=.1"), "did you mean 'heads'?"),
    "units": (("inspect", "model", "--units", "neuron"), "did you mean 'neurons'?"),
    "a criterion": (("inspect", "model", "--criterion", "fischer"), "did you mean 'fisher'?"),
    "a criterion's kind": (("inspect", "model", "--criterion", "head=fisher"), "'heads'"),
    "a metric": (("compare", "a", "b", "--metric", "acuracy"), "did you mean 'accuracy'?"),
    "a format": (("export", "model", "--output", "new", "--format", "onxn"), "'onnx'"),
    "a task": (("families", "--task", "txt"), "did you mean 'text'?"),
}


def test_a_wrong_name_is_told_before_anything_heavy_is_loaded(hfslim, monkeypatch) -> None:
    code = "import sys\nfrom hfslim.cli import main\ntry: main({})\nexcept SystemExit as end: "
    code += "print(end.code, *sys.modules)"
    arguments = (*EARLY["a target"][0], "--data", "a.csv", "--output", "new")
    done = subprocess.run(
        [sys.executable, "-c", code.format(list(arguments))], capture_output=True, text=True
    )
    ended, *loaded = done.stdout.split()
    assert (ended, "did you mean 'macs'?" in done.stderr) == ("2", True), done.stderr
    assert {"torch", "transformers", "datasets", "numpy"} & {*loaded} == set()

    @contextmanager
    def too_late():
        raise AssertionError("the work began")
        yield

    for module in ("pruning", "inspecting", "measuring", "exporting", "sharing"):
        monkeypatch.setattr(f"hfslim.cli.{module}.working", too_late)
    for arguments, hint in EARLY.values():
        more = ("--data", "a.csv", "--output", "new") if arguments[0] == "prune" else ()
        done = hfslim(*arguments, *more)
        assert (done.code, done.out) == (2, "")
        assert hint in done.err and "stages[" not in done.err


def test_the_names_that_are_checked_early_are_those_of_the_library() -> None:
    assert {*options.METRICS} == {*METRICS}
    assert {*options.CRITERIA} <= {*CRITERIA}
    assert {*options.TARGETS} == {*RESOURCES, "sparsity"}


MISTAKES = {
    "no such verb": (("inspct", "model"), 2, "Did you mean 'inspect'?"),
    "no such option": (("measure", "model", "--bath-size", "1"), 2, "--batch-size"),
    "a missing argument": (("compare", "model"), 2, "AFTER"),
    "no such folder": (("measure", "./none"), 2, "no folder './none'"),
    "no such file": (("inspect", "model", "--data", "none.csv"), 2, "no file 'none.csv'"),
    "an unknown key of data": (("inspect", "model", "--data", "text_colum=a"), 2, "text_column"),
    "a folder as data": (("inspect", "model", "--data", "vit"), 2, "train_dir=vit"),
    "an unknown criterion": (("inspect", "model", "--criterion", "magic"), 2, "'magnitude'"),
    "a criterion that needs data": (("inspect", "model", "--criterion", "fisher"), 1, "data is"),
    "an unknown unit": (("inspect", "model", "--units", "toes"), 2, "'heads'"),
    "classes without data": (("inspect", "model", "--by-class"), 2, "add --data"),
    "no scores to compare": (("inspect", "model", "--against", "train.json"), 2, "cannot be read"),
    "a picture of no kind": (("inspect", "model", "--picture", "a.bmp"), 2, ".svg"),
    "an unknown metric": (("compare", "model", "other", *DATA, "--metric", "acc"), 2, "'accuracy'"),
    "data of another kind": (("inspect", "vit", *DATA), 2, "no column 'image or img'"),
    "a target that is no pair": (
        ("prune", "model", "--target", "half", *DATA, "--output", "new"),
        2,
        "expected KEY=VALUE, got 'half'",
    ),
    "an unknown target": (
        ("prune", "model", "--target", "mac=0.5", *DATA, "--output", "new"),
        2,
        "'macs'",
    ),
    "an unknown key of a stage": (
        ("prune", "model", "--target", "macs=0.5", *DATA, "--output", "new", "--schedul", "cubic"),
        2,
        "did you mean 'schedule'?",
    ),
    "no data to prune on": (
        ("prune", "model", "--target", "macs=0.5", "--output", "new"),
        2,
        "--data",
    ),
    "a target out of reach": (
        ("prune", "model", "--target", "macs=0.001", *DATA, "--output", "new"),
        2,
        "target",
    ),
    "an output that is there": (
        ("prune", "model", "--target", "macs=0.5", *DATA, "--output", "vit"),
        1,
        "'vit' is there and not empty",
    ),
    "an unknown format": (("export", "model", "--format", "onxx", "-o", "new"), 2, "'onnx'"),
    "int8 for torch": (
        ("export", "model", "--format", "torch-export", "--int8", "-o", "new"),
        2,
        "int8 is for onnx",
    ),
    "a card for nothing": (("card", "empty"), 1, "empty"),
    "a card over another": (("card", "described"), 1, "not a card of hfslim"),
    "no report": (("report", "empty"), 2, "no report.json in 'empty'"),
    "models of two tasks": (
        ("compare", "model", "vit"),
        2,
        "is for text-classification and vit for image",
    ),
    "a folder that is not there": (("push", "none", "you/model"), 2, "'none' does not exist"),
    "an id that the Hub has not": (("push", "model", "you/a/b"), 2, "you/a/b"),
    "an unknown task": (("families", "--task", "video"), 2, "'text'"),
    "no recipe": (("run", "none.yaml"), 2, "no recipe 'none.yaml'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_in_one_line_with_its_code(hfslim, case: str) -> None:
    arguments, code, hint = MISTAKES[case]
    done = hfslim(*arguments)
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert (done.code, done.out) == (code, "")
    assert hint in line
    assert "Traceback" not in done.err


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is there")
@pytest.mark.parametrize("labels", [{}, {"label_names": ["no", "yes"]}])
def test_a_model_of_timm_names_the_extra_that_it_needs(hfslim, shared: Path, labels: dict) -> None:
    (shared / "timm").mkdir(exist_ok=True)
    config = {"model_type": "timm_wrapper", "architecture": "resnet18", "num_classes": 2, **labels}
    (shared / "timm" / "config.json").write_text(json.dumps(config))
    save_file({}, shared / "timm" / "model.safetensors", {"format": "pt"})
    done = hfslim("measure", "timm")
    assert (done.code, done.err.strip()) == (
        1,
        "error: a model of timm needs timm and torchvision: pip install 'hfslim[timm]'",
    )


def test_an_error_nobody_foresaw_names_its_kind_and_how_to_see_more(hfslim, monkeypatch) -> None:
    def broken(source: str) -> None:
        raise KeyError("stage")

    monkeypatch.setattr("hfslim.pipeline.opening.open_classifier", broken)
    done = hfslim("measure", "model")
    assert (done.code, done.err.strip()) == (
        1,
        "error: KeyError: 'stage' (HFSLIM_DEBUG=1 shows where)",
    )
    monkeypatch.setenv("HFSLIM_DEBUG", "1")
    with pytest.raises(KeyError):
        main(["measure", "model"])


def test_measure_tells_what_the_library_counts(hfslim) -> None:
    done = hfslim("measure", "model", "vit", *QUICK, "--json")
    text, image = done.json["models"]
    assert (text["model"], image["model"]) == ("model", "vit")
    assert text["inputs"] == "input_ids [2, 38], attention_mask [2, 38]"
    assert image["inputs"] == "pixel_values [2, 3, 16, 16]"
    assert image["parameters"] > 0 < image["macs"]
    seen = hfslim("measure", "model", *QUICK).out
    assert f"{text['parameters']:,}" in seen
    assert f"{text['macs']:,}" in seen


def test_inspect_scores_each_unit_on_the_data(hfslim) -> None:
    done = hfslim("inspect", "model", *DATA, "--max-examples", "8", "--json")
    assert done.json["criterion"] == "fisher"
    heads = [row for row in done.json["units"] if row["kind"] == "heads"]
    assert [row["units"] for row in heads] == [4, 4, 4]
    assert all(len(row["scores"]) == row["units"] for row in done.json["units"])
    assert len({row["kind"] for row in done.json["units"]}) == 3


def test_inspect_tells_classes_layers_and_what_another_model_makes_of_it(
    hfslim, shared: Path
) -> None:
    asked = ("inspect", "model", *DATA, "--units", "heads", "--batch-size", "4")
    found = hfslim(*asked, "--by-class", "--similarity", "--against", "other", "--json").json
    for row in found["units"]:
        by_class = torch.tensor(row["by_class"], dtype=torch.float64)
        total = torch.tensor(row["scores"], dtype=torch.float64)
        torch.testing.assert_close(by_class.sum(0), total, rtol=1e-6, atol=0)
    assert sum(one["examples"] for one in found["classes"]) == 16
    assert [len(row) for row in found["similarity"]] == [3, 3, 3]
    assert [one["kind"] for one in found["agreement"]] == ["heads"]
    told = found["predictions"]
    assert told["examples"] == 10
    changed = {
        outcome: sum(one[outcome] for one in told["classes"])
        for outcome in ("lost", "gained", "other")
    }
    assert sum(changed.values()) == len(told["changed"])
    assert all(one["text"] for one in told["changed"])

    (shared / "seed.json").write_text(hfslim(*asked, "--json").out)
    printed = hfslim(*asked, "--against", "seed.json", "--by-class", "--picture", "all.png").out
    assert re.search(r"heads +│ +1\.00( │ +100%){3}", printed)
    both = printed[printed.index("Units of the best 50% that both keep") :]
    scores = {
        (row["path"], unit): score
        for row in found["units"]
        for unit, score in enumerate(row["scores"])
    }
    best = sorted(scores, key=scores.__getitem__, reverse=True)[: len(scores) // 2]
    for path in {path for path, _ in scores}:
        own = ", ".join(str(unit) for unit in sorted(u for p, u in best if p == path)) or "none"
        assert re.search(rf"heads +│ {re.escape(path)} +│ {own} +│", both)
    assert "What each class needs" in printed
    assert (shared / "all.png").stat().st_size > 10_000


def test_what_cannot_be_compared_with_is_told_before_the_work(hfslim, shared: Path) -> None:
    (shared / "nothing.json").write_text("{}")
    done = hfslim("inspect", "model", *DATA, "--against", "nothing.json")
    assert (done.code, done.out, done.err) == (
        2,
        "",
        "error: --against 'nothing.json': expected what `hfslim inspect --json` prints, found no "
        "scores\n",
    )


def test_inspect_without_data_ranks_by_magnitude_and_draws(hfslim, shared: Path) -> None:
    done = hfslim("inspect", "model", "--units", "heads", "--picture", "importance.svg")
    rows = [line for line in done.out.splitlines() if " heads " in line]
    assert len(rows) == 3
    assert "magnitude" in done.out
    assert "█" in done.out
    assert "<svg" in (shared / "importance.svg").read_text()


def test_compare_judges_both_models_on_the_same_examples(hfslim) -> None:
    done = hfslim("compare", "model", "other", *DATA, *QUICK, "--json")
    (quality,) = done.json["quality"]
    (costs,) = done.json["comparisons"]
    assert quality["data"] == "evaluation, 10 examples"
    assert 0 <= done.json["agreement"] <= 1
    assert costs["before"]["macs"] == costs["after"]["macs"]
    same = hfslim("compare", "model", "model", *DATA, *QUICK)
    assert "The two agree on 100.0% of 10 examples." in same.out


def test_models_agree_by_the_names_of_classes_not_by_their_numbers(hfslim, shared: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(shared / "model")
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(parameter.flip(0))
    model.config.id2label = {0: "positive", 1: "negative"}
    model.config.label2id = {"positive": 0, "negative": 1}
    model.save_pretrained(shared / "turned")
    AutoTokenizer.from_pretrained(shared / "model").save_pretrained(shared / "turned")
    assert hfslim("compare", "model", "turned", *DATA, *QUICK, "--json").json["agreement"] == 1


def test_compare_without_data_says_nothing_of_quality(hfslim) -> None:
    done = hfslim("compare", "model", "other", *QUICK, "--json")
    assert (done.json["quality"], done.json["agreement"]) == ([], None)


def test_run_takes_overrides_and_ends_with_the_models_folder(hfslim, shared: Path) -> None:
    recipe = {
        "task": "text-classification",
        "model": "model",
        "data": {"train_file": "train.csv", "validation_file": "held.csv", "max_seq_length": 16},
        "output_dir": "out",
        "stages": [{"prune": {"target": {"macs": 0.9}}}],
    }
    (shared / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = hfslim("run", "recipe.yaml", "--stages.prune.target.macs=0.6", "--json")
    assert done.code == 0, done.err
    assert done.json["model"] == str(Path("out", "01-prune"))
    again = hfslim("run", "recipe.yaml", "--stages.prune.target.macs=0.6")
    assert again.out.splitlines() == ["model in out/01-prune"]
    assert done.json["stages"][0]["settings"]["target"] == {"macs": 0.6}
    wrong = hfslim("run", "recipe.yaml", "--stages.prune.taget.macs", "0.6")
    assert (wrong.code, "did you mean 'target'" in wrong.err) == (2, True)


def test_prune_leaves_a_folder_that_loads_with_all_that_tells_of_it(
    hfslim, shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = hfslim(
        *("prune", "model", "--target", "macs=0.6", *DATA, "--output", "made/half"),
        *("--criterion", "heads=taylor", "--criterion", "neurons=magnitude", "--json"),
    )
    assert done.code == 0, done.err
    before, after = (done.json["comparisons"][0][side] for side in ("before", "after"))
    assert after["macs"] <= 0.6 * before["macs"]
    made = shared / "made" / "half"
    assert sorted(path.name for path in made.parent.iterdir()) == ["half"]
    names = {"README.md", "config.json", "model.safetensors", "recipe.yaml", "report.json"}
    names |= {"report.html", "report.md", "figures"}
    assert names <= {path.name for path in made.iterdir()}
    assert "cut to" in (made / "report.html").read_text()
    told = re.findall(r"(?:saved|report) in (\S+)", caplog.text)
    assert len(told) == 3 and all((shared / path).exists() for path in told)
    assert json.loads((made / "report.json").read_text())["quality"] == done.json["quality"]
    stage = yaml.safe_load((made / "recipe.yaml").read_text())["stages"][0]["prune"]
    assert stage["criterion"] == {"heads": "taylor", "neurons": "magnitude"}
    again = hfslim("compare", "model", "made/half", *DATA, *QUICK, "--json")
    assert again.json["quality"][0]["value"] == done.json["quality"][0]["value"]


@pytest.mark.parametrize("fails", ["page.write_page", "report.Report.write"])
def test_a_finished_cut_is_kept_whatever_fails_after_it(
    hfslim, shared: Path, monkeypatch, tmp_path: Path, fails: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    importlib.import_module("hfslim.pipeline.runner")
    monkeypatch.setattr(f"hfslim.reporting.{fails}", full)
    output = tmp_path / "kept"
    done = hfslim("prune", "model", "--target", "macs=0.6", *DATA, "--output", str(output))
    assert (done.code, done.out) == (1, "")
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "No space left" in line and f"kept in {output}" in line
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert hfslim("measure", str(output), *QUICK).code == 0


def test_export_is_judged_on_real_examples(hfslim, shared: Path) -> None:
    done = hfslim("export", "model", "--output", "onnx", *DATA, *QUICK, "--json")
    assert done.code == 0, done.err
    quality = done.json["quality"]
    assert (quality["examples"], quality["agreement"]) == (10, 1.0)
    assert quality["difference"] < 1e-5
    assert quality["torch"] == quality["exported"]
    assert json.loads((shared / "onnx" / "export_report.json").read_text()) == done.json
    assert (shared / "onnx" / "tokenizer.json").is_file()


def test_card_is_written_for_a_name(hfslim, shared: Path) -> None:
    shutil.copytree(shared / "model", shared / "carded")
    assert hfslim("card", "carded", "--name", "you/tiny", "--json").json == {
        "card": str(Path("carded", "README.md"))
    }
    card = shared / "carded" / "README.md"
    assert "you/tiny" in card.read_text() and "compressed" not in card.read_text()
    assert hfslim("card", "carded").code == 0  # its own
    assert hfslim("card", "described").code == 1
    assert (shared / "described/README.md").read_text() == "# Our own text"
    assert hfslim("card", "described", "--force").code == 0
    assert "# Our own text" in (shared / "described/README.md").read_text()


def test_push_reaches_the_hub_and_names_the_commit(shared: Path, tmp_path: Path) -> None:
    def push(hub: Hub, token: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "hfslim", "push", "other", "lab/tiny", "--json"]
        env = environment(hub, tmp_path, token)
        return subprocess.run(command, cwd=shared, env=env, capture_output=True, text=True)

    with serve(lab="hf_lab") as hub:
        refused = push(hub, "hf_wrong")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.count("error: ") == 1
        assert "Traceback" not in refused.stderr
        done = push(hub, "hf_lab")
        assert done.returncode == 0, done.stderr
        head = hub.repos["lab/tiny"].branches["main"][-1]
        assert json.loads(done.stdout)["commit"] == head.oid
        assert {"README.md", "model.safetensors", "tokenizer.json"} <= set(head.files)


def test_families_lists_what_the_sweep_found(hfslim) -> None:
    rows = hfslim("families", "--task", "text", "--json").json["families"]
    bert = next(row for row in rows if row["model_type"] == "bert")
    assert bert["outcomes"]["heads"] == "exact"
    (line,) = [one for one in hfslim("families").out.splitlines() if "│ bert " in one]
    assert "yes" in line


def test_speech_is_audio(hfslim) -> None:
    spoken, heard = (hfslim("families", "--task", t, "--json").json for t in ("speech", "audio"))
    assert spoken == heard and spoken["families"]


def test_families_says_of_which_task_it_knows_nothing(hfslim, monkeypatch) -> None:
    module = importlib.import_module("hfslim.anatomy.coverage")
    monkeypatch.setattr(module, "coverage", lambda tasks: ())
    done = hfslim("families", "--task", "audio", "--json")
    assert (done.code, done.json) == (0, {"families": []})
    assert "audio: no type is in the table yet" in done.err


def test_completion_offers_verbs_and_kinds() -> None:
    def offered(*words: str) -> str:
        environment = {
            **os.environ,
            "_HFSLIM_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(words),
            "COMP_CWORD": str(len(words) - 1),
        }
        command = [sys.executable, "-m", "hfslim"]
        return subprocess.run(command, env=environment, capture_output=True, text=True).stdout

    assert offered("hfslim", "in").split() == ["inspect"]
    assert offered("hfslim", "inspect", "m", "--units", "h").split() == ["heads"]


def test_a_pipe_gets_the_result_and_no_bars(shared: Path) -> None:
    command = [sys.executable, "-m", "hfslim", "compare", "model", "other", *DATA, *QUICK, "--json"]
    done = subprocess.run(
        command,
        cwd=shared,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["before"] == "model"
    assert "%|" not in done.stderr
    assert "━" not in done.stderr
