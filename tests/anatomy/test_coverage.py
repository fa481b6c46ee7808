import json

import pytest
import sweep
import zoo
from places import ROOT

from hfslim.anatomy.coverage import SIGNS, coverage
from hfslim.anatomy.structure import KINDS

ROWS = {f"{row.task}/{row.model_type}": row for row in coverage()}

SPREAD = [
    *(
        f"text/{name}"
        for name in ("albert", "big_bird", "bloom", "convbert", "deberta", "flaubert")
    ),
    *(f"text/{name}" for name in ("funnel", "gpt2", "lilt", "longformer", "mobilebert")),
    *(f"text/{name}" for name in ("perceiver", "squeezebert", "t5", "xlnet")),
    *(f"image/{name}" for name in ("levit", "resnet", "swinv2")),
    *(f"audio/{name}" for name in ("sew", "wav2vec2-conformer")),
]
"""Types that differ from each other and from those of test_families."""


def test_rows_are_of_types_that_transformers_knows():
    assert set(ROWS) <= set(zoo.CASES)
    assert all(set(row.outcomes.values()) <= set(SIGNS) for row in ROWS.values())


def test_the_table_shows_each_type_once():
    lines = sweep.markdown(coverage(["text"])).splitlines()
    assert len(lines) == 2 + sum(row.task == "text" for row in ROWS.values())
    assert any(line.startswith("| `bert` | yes | yes |") for line in lines)


def test_the_page_is_what_the_code_writes():
    written = (ROOT / "docs" / "families.md").read_text()
    assert written == sweep.page(), "python tests/support/sweep.py --page"


@pytest.mark.parametrize("case", ["text/bert", "text/llama"])
def test_the_table_is_what_the_sweep_finds(case):
    for row in sweep.sweep(case):
        if "+" not in row.kind:
            assert row.outcome == ROWS[case].outcomes[row.kind], row


@pytest.mark.parametrize("case", SPREAD)
def test_a_spread_of_types_is_cut_exactly(case, tmp_path):
    kinds = tuple(kind for kind in KINDS if ROWS[case].outcomes[kind] == "exact")
    difference, _ = sweep.prove(case, "eager", kinds, tmp_path)
    assert difference <= sweep.TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_type_is_exact_or_refused():
    rows = list(sweep.run(list(zoo.CASES), jobs=2, limit=600))
    assert [row for row in rows if row.outcome in ("wrong", "error")] == []


def test_a_row_stays_where_a_package_of_the_type_is_missing(tmp_path, monkeypatch):
    row = {"heads": "exact", "reasons": {"channels": "why"}}
    folder = tmp_path / "anatomy"
    folder.mkdir()
    table = {"transformers": "5", "types": {"image": {"timm_wrapper": row}}}
    (folder / "coverage.json").write_text(json.dumps(table))
    monkeypatch.setattr(sweep.hfslim, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(sweep, "write_page", lambda: None)
    without = [
        sweep.Row(f"image/{n}", "eager", "build", "missing", reason="no package")
        for n in ("timm_wrapper", "dinat")
    ]
    sweep.record(without)
    types = json.loads((folder / "coverage.json").read_text())["types"]["image"]
    assert types["timm_wrapper"] == row
    assert types["dinat"]["heads"] == "failed"
    assert types["dinat"]["reasons"]["heads"] == "no package"


def test_nearly_all_types_are_cut_exactly():
    least = {"heads or channels": 0.93, "neurons": 0.95, "layers": 0.95}
    for part, (exact, types) in sweep.shares(ROWS.values()).items():
        assert exact >= least[part] * types > 100, part


def test_heads_that_would_need_an_attention_of_their_own_are_refused():
    for case in ("text/convbert", "text/doge", "text/longformer", "image/pvt_v2"):
        row = ROWS[case]
        assert row.outcomes["heads"] == "refused"
        assert "all heads" in row.reasons["heads"]
        assert {row.outcomes[kind] for kind in ("neurons", "layers")} == {"exact"}


def test_the_readme_tells_the_shares_of_the_table():
    found = sweep.shares(ROWS.values())
    (parts, types), (layers, deep) = found["heads or channels"], found["layers"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"all {len(ROWS)} types of transformers' classifiers" in readme
    told = (
        f"heads or channels of {parts} of the {types} that build and have any, layers of {layers}"
    )
    assert f"{told} of {deep}." in readme
