"""A report shows every figure with what it holds for, on the screen and on disk."""

import dataclasses
import json

import pytest
from comparisons import comparison
from rich.console import Console

from hfslim.reporting.provenance import Machine, Origin, Provenance
from hfslim.reporting.report import Quality, Report


@pytest.fixture
def report() -> Report:
    return Report(
        model="tiny-bert",
        comparisons=[comparison(1), comparison(32)],
        quality=[Quality("accuracy", value=0.79, teacher=0.80, data="test, 500 examples")],
        structure=[
            {"kind": "heads", "path": "layer.10.attention", "kept": 6, "total": 12},
            {"kind": "neurons", "path": "layer.2.ffn", "kept": 0, "total": 64},
            {"kind": "heads", "path": "layer.2.attention", "kept": 12, "total": 12},
        ],
        stages=[{"transfer": {}}, {"prune": {"target": {"macs": 0.5}, "criterion": "fisher"}}],
    )


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


def shown(report: Report) -> str:
    console = Console(width=180)
    with console.capture() as capture:
        report.print(console)
    return capture.get()


@pytest.mark.parametrize("render", [shown, Report.to_markdown], ids=["screen", "markdown"])
def test_each_figure_stands_beside_its_change(render, report: Report) -> None:
    text = render(report)
    assert lines_with(text, "parameters without embeddings", "1,000,000", "500,000", "50.0% kept")
    assert lines_with(text, "MACs, batch 32", "96,000,000", "48,000,000", "50.0% kept")
    assert lines_with(text, "p50 ms, batch 1 ", "10.00", "5.00", "speedup 2.00x (1.90 to 2.10)")
    assert lines_with(text, "p95 ms, batch 32", "12.00", "6.00", "2.00x")
    assert lines_with(text, "examples/s, batch 32", "3,200.0", "6,400.0", "2.00x")
    assert lines_with(text, "accuracy, test, 500 examples", "0.8000 (teacher)", "0.7900", "-0.0100")


@pytest.mark.parametrize("render", [shown, Report.to_markdown], ids=["screen", "markdown"])
def test_the_conditions_of_each_batch_are_stated(render, report: Report) -> None:
    text = render(report)
    conditions = "cpu, float32, 2 threads; 30 calls of each"
    assert lines_with(text, "Batch 1: input_ids [1, 128]", conditions)
    assert lines_with(text, "Batch 32: input_ids [32, 128]", conditions)


@pytest.mark.parametrize("render", [shown, Report.to_markdown], ids=["screen", "markdown"])
def test_layers_stand_in_order_with_a_bar_of_what_is_kept(render, report: Report) -> None:
    text = render(report)
    paths = ["layer.2.attention", "layer.2.ffn", "layer.10.attention"]
    assert sorted(paths, key=text.index) == paths
    assert lines_with(text, "layer.10.attention", "heads", "█" * 12 + "░" * 12, "6 / 12")
    assert lines_with(text, "layer.2.ffn", "neurons", "░" * 24, "0 / 64")
    assert lines_with(text, "layer.2.attention", "█" * 24, "12 / 12")


@pytest.mark.parametrize("render", [shown, Report.to_markdown], ids=["screen", "markdown"])
def test_the_stages_are_listed_in_order_with_their_settings(render, report: Report) -> None:
    text = render(report)
    assert "1. transfer\n2. prune: target={'macs': 0.5}, criterion=fisher" in text


@pytest.mark.parametrize(("kept", "filled"), [(1, 1), (999, 23)])
def test_a_single_survivor_or_removal_shows_in_the_bar(kept: int, filled: int) -> None:
    row = {"kind": "neurons", "path": "ffn", "kept": kept, "total": 1000}
    report = Report("m", [comparison(1)], structure=[row])
    assert report.to_markdown().count("█") == filled


def test_different_conditions_before_and_after_are_both_stated() -> None:
    pair = comparison(1)
    time = dataclasses.replace(pair.after.latency, dtype="bfloat16")
    after = dataclasses.replace(pair.after, latency=time)
    text = Report("m", [dataclasses.replace(pair, after=after)]).to_markdown()
    assert "before cpu, float32, 2 threads; after cpu, bfloat16, 2 threads" in text


def test_the_folder_holds_the_same_report_as_json_and_markdown(report: Report, tmp_path) -> None:
    folder = tmp_path / "new" / "folder"
    report.write(folder)
    written = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert written == report.to_dict()
    assert written["comparisons"][1]["after"]["latency"]["batch_size"] == 32
    assert written["quality"][0]["difference"] == pytest.approx(-0.01)
    assert (folder / "report.md").read_text(encoding="utf-8") == report.to_markdown()


def test_a_metric_without_a_value_is_shown_and_written_as_null(tmp_path) -> None:
    quality = Quality("pearson", value=float("nan"), teacher=0.9, data="test")
    report = Report("m", [comparison(1)], quality=[quality])
    report.write(tmp_path)
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["quality"][0]
    assert (written["value"], written["difference"], written["teacher"]) == (None, None, 0.9)
    assert lines_with(report.to_markdown(), "pearson, test", "| nan |")


@pytest.mark.parametrize("render", [shown, Report.to_markdown], ids=["screen", "markdown"])
def test_what_was_not_measured_is_called_so(render) -> None:
    text = render(Report("m", quality=[Quality("accuracy", 0.5, None, "test")]))
    assert lines_with(text, "MACs", "not measured")
    assert lines_with(text, "accuracy, test", "not measured", "0.5000")


def test_a_report_reads_back_as_it_was_written(report: Report, tmp_path) -> None:
    made = dataclasses.replace(
        report,
        quality=[Quality("pearson", float("nan"), 0.9, "test", examples=3, seeds=(1, 2))],
        provenance=Provenance(
            task="text-classification",
            base=Origin("org/base", on_hub=True, revision="abc"),
            losses={"1. transfer": "loss_hard"},
            seeds=(1, 2),
            machine=Machine("a processor, 2 cores", "Linux", {"torch": "2"}),
        ),
    )
    made.write(tmp_path)
    again = Report.load(tmp_path)
    assert again.to_dict() == made.to_dict()
    assert again.provenance == made.provenance
    assert again.comparisons == made.comparisons


def test_what_is_no_report_is_refused_with_its_path(tmp_path) -> None:
    (tmp_path / "report.json").write_text('{"model": "m", "comparisons": [1]}')
    with pytest.raises(ValueError, match=r"report\.json is not a report of hfslim"):
        Report.load(tmp_path)


def test_zeros_are_told_with_what_they_are_not_good_for(report: Report) -> None:
    row = {"kind": "all", "weights": 2000, "nonzero": 1000, "sparsity": 0.5, "pattern": ""}
    sparse = dataclasses.replace(report, weight_sparsity=[row])
    assert Report.from_dict(sparse.to_dict()).weight_sparsity == [row]
    assert "| all | 2,000 | 50.0% | unstructured |" in sparse.to_markdown()
    console = Console(record=True, width=200)
    sparse.print(console)
    for text in (sparse.to_markdown(), console.export_text()):
        assert "they bring no speed" in text
        assert "2:4" not in text
    assert "Zeros" not in report.to_markdown()
