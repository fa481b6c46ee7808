"""The card says what the report says, keeps what a user wrote, and blames no one for blanks."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from comparisons import comparison
from huggingface_hub import ModelCard
from PIL import Image

from hfslim.hub.card import write_card
from hfslim.hub.edits import MARKER, CardError, merge
from hfslim.measuring.class_answers import ClassAnswers
from hfslim.reporting.provenance import Machine, Origin, Provenance
from hfslim.reporting.report import Quality, Report

STRUCTURE = [
    {"kind": "heads", "path": "layer.0.attention", "kept": 3, "total": 12},
    {"kind": "heads", "path": "layer.1.attention", "kept": 0, "total": 12},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "hfslim": {"version": 1},
        "auto_map": {"AutoModelForSequenceClassification": "modeling_hfslim.SlimBert"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def report(**changes) -> Report:
    made = Provenance(
        task="text-classification",
        base=Origin("org/base", on_hub=True, revision="1234abc"),
        teacher=Origin("org/teacher", on_hub=True, revision="5678def"),
        data=Origin("org/data", on_hub=True, config="sst2", split="validation"),
        losses={"2. recover": "0.1 loss_hard + 0.9 loss_distillation"},
        seeds=(7,),
        processes=2,
        machine=Machine("A processor, 2 cores", "Linux", {"torch": "2.13"}),
    )
    values = {
        "model": "org/base",
        "comparisons": [comparison(1), comparison(32)],
        "quality": [Quality("accuracy", 0.79, 0.80, "validation", examples=872, seeds=(7,))],
        "structure": STRUCTURE,
        "stages": [{"prune": {"criterion": "fisher"}}, {"recover": {"alpha": 0.9}}],
        "provenance": made,
    }
    return Report(**{**values, **changes})


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_the_metadata_are_the_hubs(folder: Path) -> None:
    data = ModelCard.load(write_card(folder, report(), name="me/small")).data.to_dict()
    (index,) = data.pop("model-index")
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "datasets": ["org/data"],
        "metrics": ["accuracy"],
        "tags": ["hfslim", "pruned", "distilled", "text-classification"],
    }
    assert index["name"] == "small"
    (result,) = index["results"]
    assert result["dataset"] == {
        **{"type": "org/data", "name": "org/data", "config": "sst2", "split": "validation"}
    }
    assert result["metrics"][0]["value"] == 0.79


def test_each_fact_of_the_report_is_on_the_card(folder: Path) -> None:
    text = write_card(folder, report(), name="me/small").read_text()
    assert lines_with(text, "parameters without embeddings", "1,000,000", "500,000", "50.0% kept")
    assert lines_with(text, "MACs, batch 32", "96,000,000", "48,000,000")
    assert lines_with(text, "input_ids [32, 128]", "cpu, float32, 2 threads")
    assert lines_with(text, "p95 ms, batch 1 ", "12.00", "6.00")
    assert lines_with(text, "Machine: A processor, 2 cores; Linux; torch 2.13.")
    accuracy = "| accuracy | validation | 0.800 | 0.790 | -0.010 | 872 | 7 |"
    assert accuracy in text.splitlines()
    assert lines_with(text, "base model", "[org/base](", "revision 1234abc")
    assert lines_with(text, "teacher", "[org/teacher](", "revision 5678def")
    assert lines_with(text, "importance criterion", "1. prune: fisher")
    assert lines_with(text, "loss", "2. recover: 0.1 loss_hard + 0.9 loss_distillation")
    assert lines_with(text, "`layer.1.attention`", "0 / 12")
    assert lines_with(text, "one run (seed 7)")


def test_what_is_blank_is_called_not_measured(folder: Path) -> None:
    text = write_card(folder).read_text()
    assert lines_with(text, "MACs", "not measured")
    assert lines_with(text, "base model", "not stated")
    assert "None" not in text and "nan" not in text


def test_calibration_churn_and_classes_stand_under_quality(folder: Path) -> None:
    answers = ClassAnswers(
        ("a", "b"), 20, ((9, 1, 0, 0), (8, 1, 1, 0)), None, None, 0.1, 0.02, 0.15
    )
    text = write_card(folder, report(answers=answers)).read_text()
    quality = text.partition("## Quality\n")[2].partition("\n## ")[0]
    assert "### Class by class" in quality
    assert "| a | 10 | 1.00 | 0.90 | -0.10 |" in quality
    assert "Expected calibration error, 15 bins: 0.10, of the teacher 0.02." in quality
    assert "Churn: 15.0% of the answers differ from the teacher's." in quality
    assert "Robustness and fairness after compression: not measured." in text
    assert "Robustness, calibration and fairness" in write_card(folder, report()).read_text()


def test_the_structure_is_drawn(folder: Path) -> None:
    text = write_card(folder, report()).read_text()
    assert "](structure.png)" in text
    pixels = np.asarray(Image.open(folder / "structure.png").convert("RGB"))
    kept, removed = ((pixels == rgb).all(2).sum(1) for rgb in ((0, 114, 178), (223, 227, 232)))
    width = (kept + removed).max()
    assert kept.max() / width == pytest.approx(3 / 12, abs=0.01)
    assert ((kept == 0) & (removed == width)).any(), "the second layer keeps nothing"


@pytest.mark.parametrize(
    ("changes", "ways"),
    [
        ({}, ["import hfslim", "trust_remote_code=True"]),
        ({"auto_map": {}}, ["import hfslim"]),
        ({"hfslim": None}, [""]),
        (
            {"auto_map": {"AutoModelForSequenceClassification": "modeling_own.OwnModel"}},
            ["import hfslim"],
        ),
    ],
    ids=["uneven", "no auto class", "plain", "code of its own"],
)
def test_only_the_ways_to_load_that_hold_are_shown(folder: Path, changes, ways) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    text = write_card(folder, report(), name="me/small").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == len(ways)
    assert ("ignore_mismatched_sizes" in text) is ("hfslim" in config)
    own = "modeling_own" in str(config.get("auto_map"))
    assert own is ("which needs both" in text)
    assert not own or 'from_pretrained("me/small", trust_remote_code=True)' in blocks[0]
    for block, way in zip(blocks, ways, strict=True):
        compile(block, "card", "exec")
        assert way in block
        assert 'pipeline("text-classification", model="me/small"' in block


def test_a_local_base_model_is_named_without_a_link(folder: Path) -> None:
    made = Provenance(base=Origin("my-bert"), data=Origin("train.csv"))
    card = ModelCard.load(write_card(folder, report(provenance=made)))
    assert "base_model" not in card.data.to_dict()
    assert lines_with(card.text, "base model", "| my-bert |")
    assert not re.search(r"\]\((?!structure\.png)", card.text)


def test_what_a_user_wrote_survives(folder: Path) -> None:
    path = write_card(folder, report())
    card = ModelCard.load(path)
    card.data["license"] = "mit"
    card.data["tags"].append("tweets")
    card.text = card.text.replace("# ", "# Edited ") + "\n## Thanks\n\nTo all.\n"
    card.save(path)
    again = ModelCard.load(write_card(folder, report(quality=[])))
    assert again.data.license == "mit"
    assert again.data.tags[-1] == "tweets"
    assert again.text.endswith(f"{MARKER}\n\n## Thanks\n\nTo all.\n")
    assert "Edited" not in again.text
    assert "metrics" not in again.data.to_dict()
    assert write_card(folder, report(quality=[])).read_text() == str(again)


def test_a_card_that_hfslim_did_not_write_is_kept_below_the_marker(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# My own words\n")
    text = write_card(folder).read_text()
    assert "license: mit" in text
    assert text.partition(MARKER)[2].strip() == "# My own words"


def test_a_draft_of_transformers_is_not_kept(folder: Path) -> None:
    draft = (
        "---\ntags:\n- generated_from_trainer\nmodel-index:\n- name: x\n  results: []\n---\n"
        "<!-- This model card has been generated automatically according to the information the "
        "Trainer had access to. -->\nThis model was trained from scratch on an unknown dataset.\n"
    )
    (folder / "README.md").write_text(draft)
    text = write_card(folder).read_text()
    assert "scratch" not in text and "generated_from_trainer" not in text


def test_two_different_texts_of_the_users_are_not_joined_silently(folder: Path) -> None:
    card = write_card(folder).read_text()
    with pytest.raises(CardError, match=r"differ below the line.*'mine' here, 'theirs' there"):
        merge(card + "\nmine\n", card + "\ntheirs\n")


@pytest.mark.parametrize("content", [None, "{", "[1]"], ids=["missing", "damaged", "no mapping"])
def test_a_folder_without_a_model_is_refused(content, tmp_path: Path) -> None:
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CardError, match=r"config\.json"):
        write_card(tmp_path)
