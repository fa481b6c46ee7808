"""The page of a report needs nothing else, says what the report says, and reads aloud."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from comparisons import comparison

from hfslim.cli import main
from hfslim.measuring.class_answers import ClassAnswers
from hfslim.pipeline.seeds import over_seeds
from hfslim.reporting.page import page, write_all, write_page
from hfslim.reporting.plots import plots_of
from hfslim.reporting.plots.style import PAPER
from hfslim.reporting.report import Quality, Report
from hfslim.reporting.verdict import title, verdict

FIGURES = ["curve", "structure", "changes", "agreement", "confusion", "course", "importance"]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def answers_of(classes: int) -> ClassAnswers:
    generator = np.random.default_rng(classes)
    truth = np.arange(classes * 12) % classes
    taught, said = (
        np.eye(classes)[truth] * 3 + generator.normal(size=(len(truth), classes)) * k
        for k in (1, 2)
    )
    return ClassAnswers.of([f"class {i}" for i in range(classes)], truth, said, taught)


def report_of(classes: int = 5, **changes) -> Report:
    units = [
        {
            "stage": "02-prune",
            "kind": kind,
            "path": f"encoder.layer.{layer}.{part}",
            "total": cells,
            "kept": [float((layer + i) % 3 > 0) for i in range(min(cells, 96))],
            "importance": [float(i * (layer + 1)) for i in range(min(cells, 96))],
        }
        for kind, part, cells in (("heads", "attention", 12), ("neurons", "mlp", 3072))
        for layer in range(4)
    ]
    steps = list(range(10, 110, 10))
    series = {
        name: {"step": steps, "value": [1 / s for s in steps]} for name in ("loss", "loss_hard")
    }
    history = [
        {"stage": "01-transfer", "steps": 100, "series": series, "metrics": {"accuracy": 0.9}},
        {"stage": "02-prune", "steps": 0, "series": {}, "metrics": {"accuracy": 0.6}},
        {"stage": "03-recover", "steps": 100, "series": series, "metrics": {"accuracy": 0.8125}},
    ]
    curve = [
        {"label": label, "metric": metric, "macs": macs, "latency_ms": {"1": ms, "32": 20 * ms}}
        for label, metric, macs, ms in (
            ("whole model", 0.9, 1.0, 10.0),
            ("02-prune", 0.6, 0.5, 5.0),
            ("03-recover", 0.8125, 0.5, 5.0),
        )
    ]
    return Report(
        "tiny-bert",
        [comparison(1), comparison(32)],
        [Quality("accuracy", 0.8125, 0.9, "evaluation, 60 examples", 60, (42,))],
        structure=[{"kind": "heads", "path": "layer.0", "kept": 6, "total": 12}],
        stages=[{"prune": {"target": {"macs": 0.5}}}],
        answers=answers_of(classes),
        warnings=["class 3: 10.0% of its 12 examples are right"],
        curve=curve,
        units=units,
        history=history,
        **changes,
    )


def long_report() -> Report:
    """Five stages, two of which cut, seven losses, and names as long as they come."""
    report = report_of(12)
    steps = [1, 50, 100]
    names = ("loss", "loss_hard", "loss_distillation", "loss_hidden", "loss_attention", "loss_l0")
    shares = ("kept_heads", "kept_neurons", "kept_layers", "expected_macs", "weight_sparsity")
    series = {name: {"step": steps, "value": [1.0, 0.5, 0.25]} for name in (*names, *shares)}
    stages = ("01-transfer", "02-prune", "03-recover", "04-prune", "05-recover")
    return replace(
        report,
        model="organisation-of-many-letters/model-with-a-very-long-name-v3-base-uncased",
        answers=replace(
            report.answers, classes=tuple(f"a rather long class name {i}" for i in range(12))
        ),
        history=[
            {"stage": name, "steps": 100, "series": series, "metrics": {"accuracy": 0.8}}
            for name in stages
        ],
        units=[
            {**row, "stage": stage, "path": f"model.encoder.transformer.{row['path']}.self"}
            for stage in ("02-prune", "04-prune")
            for row in report.units
        ],
    )


LOOK = """<!doctype html><body>
<iframe src="PAGE" width="WIDTH" height="8000" frameborder="0"></iframe>
<script>
onload = () => {
  const inner = document.querySelector("iframe").contentDocument;
  inner.querySelectorAll("details").forEach(d => d.open = true);
  const cut = [], crossed = [];
  let texts = 0;
  for (const figure of inner.querySelectorAll("figure")) {
    const outer = figure.querySelector("svg").getBoundingClientRect();
    const all = [...figure.querySelectorAll("svg text")].filter(t => t.textContent.trim());
    const boxes = all.map(t => t.getBoundingClientRect());
    texts += all.length;
    boxes.forEach((a, i) => {
      if (a.left < outer.left - 1 || a.right > outer.right + 1 || a.top < outer.top - 1)
        cut.push(all[i].textContent);
      if (figure.id != "confusion")  // whose slanted names have boxes that cross
        for (let j = 0; j < i; j++) {
          const b = boxes[j];
          if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1.5
              && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
            crossed.push(all[i].textContent + " × " + all[j].textContent);
        }
    });
  }
  const seen = {wide: inner.documentElement.scrollWidth, texts: texts > 100, cut, crossed};
  document.body.innerHTML = "<pre></pre>";
  document.querySelector("pre").textContent = JSON.stringify(seen);
};
</script>"""


class Page(HTMLParser):
    """What a browser would follow, look up and read aloud."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.labels: list[str] = []
        self.pictures = 0
        self.script = ""
        self.cells: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "xlink:href") and tag == "a":
                self.links.append(value or "")
            elif name in ("href", "xlink:href", "src", "srcset", "data", "action", "poster"):
                self.sources.append(value or "")
            elif name == "aria-labelledby":
                self.labels += (value or "").split()
        self.pictures += tag == "svg" and ("role", "img") in attrs
        assert tag not in ("iframe", "object", "embed", "base")

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.script += data
        elif self._inside in ("td", "th", "b"):
            self.cells.append(data.strip())


@pytest.fixture(scope="module")
def text() -> str:
    return page(report_of())


def test_the_page_needs_nothing_else(text: str) -> None:
    found = Page(text)
    assert [x for x in found.sources if not x.startswith(("#", "data:"))] == []
    assert found.links == []
    assert "@import" not in text and "<script src" not in text
    outside = re.findall(r"url\((?!['\"]?(?:#|data:))[^)]*\)", text)
    assert outside == []
    assert re.findall(r"https?://", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)) == []


def test_every_name_on_the_page_is_unique_and_resolves(text: str) -> None:
    found = Page(text)
    assert len(found.ids) == len(set(found.ids))
    named = {x[1:] for x in found.sources if x.startswith("#")} | set(found.labels)
    named |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert len(named) > len(FIGURES)
    assert named <= set(found.ids)


def test_every_figure_is_there_with_words_and_numbers(text: str) -> None:
    made = plots_of(report_of())
    assert [plot.name for plot in made] == FIGURES
    assert Page(text).pictures == len(FIGURES)
    for plot in made:
        (words,) = re.findall(rf'<desc id="{plot.name}-alt">(.*?)</desc>', text, re.DOTALL)
        assert len(words) > 60
        assert plot.table.rows
    assert not re.search(r"\bnan\b|#0000[01]\d", re.sub(r"<script.*?</script>", "", text))


def test_the_page_holds_the_report_and_shows_its_values(text: str) -> None:
    report = report_of()
    found = Page(text)
    assert json.loads(found.script) == report.to_dict()
    answers = report.answers
    assert answers is not None and answers.churn is not None
    for value in ("0.81", "50.0%", "2.00×", f"{answers.churn:.1%}"):
        assert value in found.cells
    for line in answers.lines():
        cells = {f"{line.teacher:.2f}", f"{line.model:.2f}", f"{line.change:+z.2f}"}
        assert cells <= set(found.cells)
    for plot in plots_of(report):
        for row in plot.table.rows:
            assert set(row) <= {*found.cells, ""}


def test_the_page_is_made_from_the_json_alone(tmp_path: Path, capsys, text: str) -> None:
    report_of().write(tmp_path)
    main_exits(["report", str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == text
    pictures = {p.stem: p.read_bytes()[:4] for p in (tmp_path / "figures").iterdir()}
    assert pictures == dict.fromkeys(FIGURES, b"\x89PNG")


def main_exits(arguments: list[str], code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code


def test_names_are_text_and_neither_markup_nor_formulas() -> None:
    report = report_of()
    assert report.answers is not None
    evil = ("<script>alert(1)</script>", "$x^$", "a&b", "c", "d")
    text = page(replace(report, answers=replace(report.answers, classes=evil), model="</title>"))
    assert "<script>alert" not in text and "</title></title>" not in text
    assert Page(text).script.count("alert(1)") == 1
    assert "$x^$" in text


@pytest.mark.parametrize("classes", [2, 40])
def test_few_and_many_classes_are_drawn(classes: int) -> None:
    text = page(report_of(classes))
    assert Page(text).pictures == len(FIGURES)
    assert len(text) < 1_000_000


def test_a_report_of_little_is_a_page_too() -> None:
    text = page(Report("m", quality=[Quality("pearson", 0.5, None, "test")]))
    assert Page(text).pictures == 0
    assert "0.5000" in Page(text).cells


def test_seeds_are_drawn_and_linked() -> None:
    report = over_seeds({1: report_of(), 2: report_of(), 3: report_of()})
    found = Page(page(report))
    assert found.links == [f"seed-{n}/report.html" for n in (1, 2, 3)]
    assert [plot.name for plot in plots_of(report)] == FIGURES
    assert {"1", "2", "3", "0.81"} <= set(found.cells)


def test_over_seeds_the_figures_that_stand_out_are_means() -> None:
    first, second = report_of(), report_of()
    (small, large) = second.comparisons
    faster = [replace(small, speedup=3.5), replace(large, speedup=5.0)]
    report = over_seeds({7: first, 8: replace(second, comparisons=faster)})
    text = page(report)
    tiles = dict(re.findall(r'<li class="tile"><span>(.*?)</span><b>(.*?)</b>', text))
    assert (tiles["speedup, batch 1"], tiles["speedup, batch 32"]) == ("2.75×", "3.50×")
    assert "<span>2.00 to 5.00 by seed</span>" in text
    assert re.search(r"<span>[\d,]+, seed 7</span>", text)
    assert report.measurement_conditions()[0] == "Costs are those of seed 7."


def test_the_first_sentence_is_the_verdict() -> None:
    text = page(report_of())
    assert "<h1>tiny-bert, cut to 50% of its operations</h1>" in text
    assert "<title>tiny-bert, cut to 50% of its operations</title>" in text
    (told,) = re.findall(r'<p class="verdict">(.*?)</p>', text)
    assert told == (
        "50.0% of the operations are left, it is 2.00 times as fast at batch 32, and the accuracy "
        "is 0.81, where it was 0.90 (more than chance explains)."
    )
    slow = [replace(one, speedup=1.01, low=0.97, high=1.05) for one in report_of().comparisons]
    assert "it is as fast as before at batch 32" in verdict(replace(report_of(), comparisons=slow))
    assert title(replace(report_of(), model="org/name", comparisons=())) == "org/name, pruned"
    assert title(replace(report_of(), model="/a/b/name", structure=())).startswith("name, 50%")
    alone = Report("m", quality=[Quality("pearson", 0.5, None, "test", 300)])
    assert verdict(alone) == "The pearson is 0.500."
    assert verdict(Report("m")) == ""


@pytest.mark.parametrize(
    ("examples", "shown"), [(12, "0.66"), (300, "0.659"), (5000, "0.6589"), (10**6, "0.6589")]
)
def test_a_figure_is_as_exact_as_its_examples(examples: int, shown: str) -> None:
    quality = Quality("accuracy", 0.65891, None, "test", examples)
    found = Page(page(Report("m", quality=[quality]))).cells
    assert shown in found and not any(cell.startswith(shown) and cell != shown for cell in found)


def test_over_two_seeds_each_point_names_its_seed_and_each_run_its_course() -> None:
    report = over_seeds({7: report_of(), 8: report_of()})
    drawn = {plot.name: plot for plot in plots_of(report)}
    curve = drawn["curve"].draw(PAPER).axes[0]
    assert sorted(text.get_text() for text in curve.texts) == ["7"] * 3 + ["8"] * 3
    course = drawn["course"].draw(PAPER).axes[-1]
    assert [t.get_text() for t in course.get_legend().get_texts()] == ["seed 7", "seed 8"]
    assert [row[0] for row in drawn["course"].table.rows][::3] == [
        "seed 7, 01-transfer",
        "seed 8, 01-transfer",
    ]
    shown = {"course": "Training", "structure": "Kept units", "importance": "Importance of units"}
    assert {name: drawn[name].title for name in shown} == {
        name: f"{title}, seed 7" for name, title in shown.items()
    }


def test_only_losses_have_the_colour_and_the_hatching_of_losses() -> None:
    right = ((8, 2, 0, 0), (8, 0, 2, 0), (8, 0, 0, 2))
    answers = ClassAnswers(("worse", "better", "same"), 30, right, None, None, 0.1, 0.1, 0.1)
    plot = next(p for p in plots_of(Report("m", answers=answers)) if p.name == "changes")
    bars = plot.draw(PAPER).axes[0].patches
    assert [(bar.get_width() < 0, bool(bar.get_hatch())) for bar in bars] == [
        (True, True),
        (False, False),
        (False, False),
    ]
    assert len({bar.get_facecolor() for bar in bars[1:]}) == 1 != bars[0].get_facecolor()


def three_kinds() -> Report:
    """One gradual cut of three kinds of units, as wide as a legend of three gets."""
    report = report_of()
    names = ("loss", "loss_distillation", "loss_hard", "kept_heads", "kept_neurons", "kept_layers")
    series = {name: {"step": [1, 100], "value": [1.0, 0.5]} for name in names}
    return replace(report, history=[{**one, "series": series} for one in report.history])


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("course", three_kinds),
        ("course", long_report),
        ("structure", long_report),
        ("importance", long_report),
    ],
)
def test_no_text_is_cut_off_however_long_the_names(name: str, make) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    plot = next(one for one in plots_of(make()) if one.name == name)
    with rc_context(PAPER.settings):
        figure = plot.draw(PAPER)
        FigureCanvasAgg(figure).draw()
        ticks = {t for axes in figure.axes for t in axes.get_xticklabels(which="both")}
        texts = [t for t in figure.findobj(Text) if t.get_text() and t not in ticks]
        places = [(text.get_text(), text.get_window_extent()) for text in texts]
    width, height = figure.bbox.size
    assert [
        told
        for told, place in places
        if place.x0 < -1 or place.y0 < -1 or place.x1 > width + 1 or place.y1 > height + 1
    ] == []


def test_no_two_lines_of_one_figure_look_alike() -> None:
    plot = next(one for one in plots_of(long_report()) if one.name == "course")
    for axes in plot.draw(PAPER).axes[:2]:
        lines = [line for line in axes.lines if not line.get_label().startswith("_")]
        assert len(lines) > 4
        assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == len(lines)


DRAWS = """
import sys
from pathlib import Path
import hfslim.cli.sharing, hfslim.hub.card, hfslim.reporting.page
from hfslim.reporting.plots.maps import draw_structure
assert not any(name.startswith("matplotlib") for name in sys.modules)
draw_structure([{"kind": "heads", "path": "a", "kept": 1, "total": 2}], Path(sys.argv[1]))
assert "matplotlib.pyplot" not in sys.modules
import matplotlib
assert not isinstance(dict.__getitem__(matplotlib.rcParams, "backend"), str)
"""


def test_matplotlib_is_imported_to_draw_and_keeps_its_backend(tmp_path: Path) -> None:
    picture = tmp_path / "structure.png"
    done = subprocess.run([sys.executable, "-c", DRAWS, str(picture)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_tensorboard_gets_figures_numbers_and_text(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_all(report_of(), tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {f"report/{name}" for name in FIGURES}
    assert events.Scalars("report/accuracy")[0].value == 0.8125
    assert tags["tensors"] == ["report/text_summary"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("make", [report_of, long_report, three_kinds])
def test_a_browser_has_nothing_to_complain_of(tmp_path: Path, make, width: int) -> None:
    """In a frame of that width, as Chromium's own window is never narrower than 500 pixels."""
    path = write_page(make(), tmp_path)
    outer = tmp_path / "outer.html"
    outer.write_text(LOOK.replace("WIDTH", str(width)).replace("PAGE", path.name))
    done = subprocess.run(
        [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            "--hide-scrollbars",
            *("--enable-logging=stderr", "--window-size=1400,9000"),
            *("--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"),
            outer.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr
    seen = re.search(r"<pre>(.*)</pre>", done.stdout, re.DOTALL)
    assert seen is not None, done.stderr
    assert json.loads(seen[1]) == {"wide": width, "texts": True, "cut": [], "crossed": []}
