"""An exported file computes what the pruned model does, or is not there."""

import json
import math
import sys
from pathlib import Path

import onnx as onnx_files
import pytest
import torch
from models import tiny
from standins import WORDS, text_model
from structures import uneven
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import hfslim
from hfslim.hub.export import ExportError, open_exported
from hfslim.pruning.surgery.proof import probe_inputs

QUICK = {"batch_sizes": [2], "calls": 1}


def pruned(family: str) -> torch.nn.Module:
    model = tiny(family, attention="sdpa")
    return hfslim.shrink(model, uneven(model))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned text model with its tokenizer."""
    folder = text_model(tmp_path_factory.mktemp("text") / "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    hfslim.shrink(model, uneven(model)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def onnx(text: Path) -> Path:
    model = AutoModelForSequenceClassification.from_pretrained(text)
    tokenizer = AutoTokenizer.from_pretrained(text)
    hfslim.export(model, text.parent / "onnx", processor=tokenizer, **QUICK)
    return text.parent / "onnx"


FAMILIES = {
    "vit": {"pixel_values": ("batch", 3, 16, 16)},
    "wav2vec2": {"input_values": ("batch", "length")},
    "whisper": {"input_features": ("batch", 16, 40)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_equals_the_pruned_model_at_any_batch(family: str, tmp_path: Path) -> None:
    model = pruned(family)
    made = hfslim.export(model, tmp_path / "out", **QUICK)
    assert made.axes == FAMILIES[family]
    assert made.difference <= 1e-5
    name, sizes = next(iter(made.axes.items()))
    shape = [{"batch": 5, "length": 900}.get(size, size) for size in sizes]
    inputs = {name: torch.randn(shape)}
    with torch.no_grad():
        expected = model(**inputs).logits
    assert torch.allclose(open_exported(made.folder)(**inputs).logits, expected, atol=1e-5)


def test_a_text_file_takes_pairs_and_padding_as_the_tokenizer_gives_them(
    text: Path, onnx: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(text)
    tokenizer = AutoTokenizer.from_pretrained(onnx)
    inputs = tokenizer(["a good film", "the"], ["dull", "plot"], padding=True, return_tensors="pt")
    assert inputs["token_type_ids"].sum() > 0 < (inputs["attention_mask"] == 0).sum()
    with torch.no_grad():
        expected = model(**inputs).logits
    assert torch.allclose(open_exported(onnx)(**inputs).logits, expected, atol=1e-5)
    report = json.loads((onnx / "export_report.json").read_text())
    assert report["axes"]["token_type_ids"] == ["batch", "length"]
    assert report["latency"][0]["after"]["device"] == "cpu, ONNX Runtime"


def test_the_config_beside_the_file_has_the_labels_and_nothing_of_hfslim(onnx: Path) -> None:
    config = json.loads((onnx / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert {"hfslim", "quantization_config", "auto_map"} & set(config) == set()


def test_a_pipeline_runs_the_file(text: Path, onnx: Path) -> None:
    exported = open_exported(onnx)
    exported.forward = exported.__call__
    tokenizer = AutoTokenizer.from_pretrained(onnx)
    sentence = " ".join(WORDS[:4])
    found = pipeline("text-classification", model=exported, tokenizer=tokenizer)(sentence)
    expected = pipeline("text-classification", model=str(text))(sentence)
    assert found[0]["label"] == expected[0]["label"]
    assert found[0]["score"] == pytest.approx(expected[0]["score"], abs=1e-5)


def test_int8_is_small_and_near(text: Path, onnx: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(text)
    made = hfslim.export(model, tmp_path / "int8", int8=True, **QUICK)
    exact = (onnx / "model.onnx.data").stat().st_size
    assert (made.folder / "model.onnx.data").stat().st_size < exact / 2
    assert 1e-5 < made.difference < 0.25 * made.scale
    assert made.latency[0].after.dtype == "int8"


def scales(folder: Path) -> list[int]:
    """Numbers of scales of the quantized weights of a file."""
    graph = onnx_files.load(folder / "model.onnx").graph
    named = (one for one in graph.initializer if one.name.endswith("_scale"))
    return [math.prod(one.dims) for one in named]


def test_int8_weights_have_a_scale_for_each_channel(tmp_path: Path) -> None:
    model = tiny("bert", attention="sdpa")
    made = hfslim.export(model, tmp_path / "int8", int8=True, **QUICK)
    assert max(scales(made.folder)) == model.config.intermediate_size


@pytest.mark.parametrize("family", ["bert", "vit", "wav2vec2"])
def test_int8_leaves_empty_weights_alone_and_gives_each_channel_a_scale(
    family: str, tmp_path: Path
) -> None:
    model = pruned(family)
    assert any(not weight.numel() for weight in model.parameters())
    made = hfslim.export(model, tmp_path / "int8", int8=True, **QUICK)
    assert max(scales(made.folder)) > 1
    assert made.difference < 0.05 * made.scale


@pytest.mark.parametrize("family", ["bert", "vit", "wav2vec2"])
def test_a_cut_model_has_no_linear_layer_without_inputs(family: str, tmp_path: Path) -> None:
    model = pruned(family)
    model.save_pretrained(tmp_path / "now")
    config = json.loads((tmp_path / "now/config.json").read_text())
    replaced = config["hfslim"]["replaced"]
    config["hfslim"]["replaced"] = {k: v for k, v in replaced.items() if v["by"] != "Inputless"}
    assert config["hfslim"]["replaced"] != replaced
    del config["hfslim"]["digest"]
    model.save_pretrained(tmp_path / "earlier")
    (tmp_path / "earlier/config.json").write_text(json.dumps(config))
    inputs = probe_inputs(model)
    expected = model(**inputs).logits
    for loaded in (model, *(type(model).from_pretrained(tmp_path / n) for n in ("now", "earlier"))):
        assert torch.equal(loaded.eval()(**inputs).logits, expected)
        small = torch.ao.quantization.quantize_dynamic(loaded, {torch.nn.Linear})
        torch.testing.assert_close(small(**inputs).logits, expected, atol=0.1, rtol=0)
        quantized = [m for m in small.modules() if type(m).__module__.startswith("torch.ao")]
        assert quantized and all(m.in_features for m in quantized if hasattr(m, "in_features"))


def test_torch_export_equals_the_model_and_leaves_it_as_it_was(text: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(text).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = hfslim.export(model, tmp_path / "pt2", "torch-export", **QUICK)
    assert made.difference <= 1e-6
    assert (made.folder / "model.pt2").is_file()
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_that_computes_something_else_is_removed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(text)

    def other(folder: Path) -> object:
        exported = open_exported(folder)

        def run(**inputs: torch.Tensor) -> object:
            output = exported(**inputs)
            output.logits = output.logits + 0.01
            return output

        run.export_format = exported.export_format
        return run

    monkeypatch.setattr(sys.modules["hfslim.hub.export.exporting"], "open_exported", other)
    with pytest.raises(ExportError, match=r"differ by 0\.01 .* was removed"):
        hfslim.export(model, tmp_path / "out" / "onnx", **QUICK)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_exported_is_refused_before_work(text: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(text)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        hfslim.export(model, tmp_path / "full")
    with pytest.raises(ValueError, match="expected one of"):
        hfslim.export(model, tmp_path / "out", "onxx")
    with pytest.raises(ValueError, match="int8 is for onnx"):
        hfslim.export(model, tmp_path / "out", "torch-export", int8=True)
    with pytest.raises(ValueError, match=r"bfloat16 .* call model\.float"):
        hfslim.export(model.bfloat16(), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
