"""What stands in files: read right, or refused with the file's name and the cause."""

import csv
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from models import tiny
from PIL import Image
from standins import text_file, text_model
from transformers import AutoConfig, GPT2Config, RobertaConfig, Wav2Vec2FeatureExtractor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hfslim.tasks import TASKS, DataConfig
from hfslim.tasks.audio import read_audio

TEXT, IMAGE, AUDIO = (TASKS[f"{kind}-classification"] for kind in ("text", "image", "audio"))


def data_of(path: Path, **fields: object) -> DataConfig:
    return DataConfig(train_file=str(path), train_val_split=0.5, **fields)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"\n\n", "is empty"),
        ("a.csv", b"text,label\n", "has a header .* and no rows"),
        ("a.csv", b"text;label\ngood;1\nbad;0\n", "separates its columns by ';'"),
        ("a.csv", b"text\tlabel\ngood\t1\nbad\t0\n", r"separates its columns by '\\t'"),
        ("a.csv", "text,label\ngood,1\ncaf\xe9,0\n".encode("latin-1"), "not UTF-8.* in line 3"),
        ("a.csv", "text,label\ngood,1\n".encode("utf-16"), "not UTF-8.* in line 1"),
        ("a.csv", b"text,label\na,1\nb,0,7,9\nc,1\n", "cannot be read as csv: .*line 3"),
        ("a.json", b"", "is empty"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": \n', "cannot be read as json"),
        ("a.jsonl", '{"text": "caf\xe9"}\n'.encode("latin-1"), "not UTF-8"),
        ("a.parquet", b"", "is empty"),
        ("a.parquet", b"PAR1 and nothing", "cannot be read as parquet"),
    ],
)
@pytest.mark.parametrize("part", ["train_file", "validation_file"])
def test_a_file_that_cannot_be_read_is_named_with_the_cause(
    tmp_path: Path, part: str, name: str, content: bytes, cause: str
) -> None:
    bad, good = tmp_path / name, tmp_path / f"good{Path(name).suffix}"
    bad.write_bytes(content)
    frame = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    writer = frame.to_csv if name.endswith("csv") else frame.to_json
    (frame.to_parquet if name.endswith("parquet") else writer)(str(good))
    files = {"train_file": str(good), "validation_file": str(good), part: str(bad)}
    with pytest.raises(ValueError, match=f"(?s){bad}.*{cause}"):
        TEXT.load_examples(DataConfig(**files), seed=0)


def test_a_file_with_a_byte_order_mark_and_windows_lines_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\r\ngood,1\r\ncafé,0\r\n".encode("utf-8-sig") * 1)
    examples = TEXT.load_examples(DataConfig(train_file=str(path), validation_file=str(path)), 0)
    assert examples.train["text"][1] == "café"


def test_one_file_is_split_by_the_seed_and_told(tmp_path: Path, caplog) -> None:
    path = text_file(tmp_path / "a.csv", 50)
    with caplog.at_level("INFO", "hfslim.tasks.data"):
        parts = [TEXT.load_examples(DataConfig(train_file=str(path)), seed) for seed in (3, 3, 4)]
    assert [(len(p.train), len(p.evaluation)) for p in parts] == [(40, 10)] * 3
    assert sorted(parts[0].evaluation["label"]) == ["negative"] * 5 + ["positive"] * 5
    rows = [list(zip(p.evaluation["text"], p.evaluation["label"], strict=True)) for p in parts]
    assert rows[0] == rows[1] != rows[2]
    told = caplog.text
    assert f"{path} is all there is: of its 50 examples, 40 are to train and 10 to evaluate" in told
    assert "seed 3" in told and "validation_file" in told


def test_one_folder_is_split_likewise(tmp_path: Path) -> None:
    for name in ("blue", "red"):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (6, 6), name).save(tmp_path / name / f"{i}.png")
    examples = IMAGE.load_examples(DataConfig(train_dir=str(tmp_path)), 0)
    assert (len(examples.train), sorted(examples.evaluation["label"])) == (16, [0, 0, 1, 1])


def test_blank_texts_are_counted_and_told(tmp_path: Path, caplog) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(["a", " ", "b", ""])]
    path.write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level("WARNING"):
        TEXT.load_examples(DataConfig(train_file=str(path), validation_file=str(path)), 0)
    assert "2 of 4 texts in column 'text' are blank (the first is row 1)" in caplog.text


def test_numbers_are_no_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n1,a\n2,b\n")
    with pytest.raises(ValueError, match="column 'text' holds 1 in row 0, not a text"):
        TEXT.load_examples(DataConfig(train_file=str(path), validation_file=str(path)), 0)


def paths_file(folder: Path, column: str, suffix: str) -> Path:
    """Write a csv of paths relative to it, and the files."""
    (folder / "media").mkdir()
    rows = []
    for i in range(8):
        name = f"media/{i}.{suffix}"
        if suffix == "png":
            Image.new("RGB", (6, 6), ("blue", "red")[i % 2]).save(folder / name)
        else:
            soundfile.write(folder / name, np.full(4000, 0.1), 8000)
        rows.append((name, ("low", "high")[i % 2]))
    path = folder / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([(column, "label"), *rows])
    return path


@pytest.mark.parametrize(
    ("task", "column", "suffix", "processor", "name"),
    [
        (
            IMAGE,
            "image",
            "png",
            ViTImageProcessorPil(size={"height": 4, "width": 4}),
            "pixel_values",
        ),
        (AUDIO, "audio", "wav", Wav2Vec2FeatureExtractor(), "wave"),
    ],
)
def test_a_csv_of_paths_is_read(
    tmp_path: Path, monkeypatch, task, column, suffix, processor, name
) -> None:
    path = paths_file(tmp_path, column, suffix)
    monkeypatch.chdir("/")
    data = DataConfig(train_file=str(path))
    examples = task.load_examples(data, 0)
    assert (len(examples.train), len(examples.evaluation)) == (6, 2)
    prepared = task.prepare(examples.train, examples, data, processor)
    assert len(prepared[0][name]) > 0
    (tmp_path / "media" / f"3.{suffix}").unlink()
    with pytest.raises(
        ValueError, match=rf"{path}: 1 of \d rows name no file in column '{column}'"
    ):
        task.load_examples(data, 0)


def test_a_column_that_holds_no_files_is_refused_with_the_key(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("image,label\n1,a\n2,b\n3,a\n4,b\n")
    with pytest.raises(ValueError, match=r"holds Value\('int64'\), not image files: set image_col"):
        IMAGE.load_examples(data_of(path), 0)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = paths_file(tmp_path, "image", "png")
    (tmp_path / "media" / "0.png").write_bytes(b"no image")
    data = DataConfig(train_file=str(path), validation_file=str(path))
    examples = IMAGE.load_examples(data, 0)
    prepared = IMAGE.prepare(examples.train, examples, data, ViTImageProcessorPil())
    with pytest.raises(ValueError, match=r"media/0\.png: not an image that can be read"):
        prepared[0]


def pixels(path: Path) -> torch.Tensor:
    raw = datasets.Dataset.from_dict({"image": [str(path)] * 2, "label": ["a", "b"]})
    raw = raw.cast_column("image", datasets.Image(decode=False))
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    return IMAGE.reader(("image",), None, processor)(raw[:1])["pixel_values"][0]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_grey_images_of_16_bits_keep_their_shades(tmp_path: Path, suffix: str) -> None:
    shades = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(shades.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(shades * 257).save(tmp_path / f"16.{suffix}")
    assert torch.equal(pixels(tmp_path / f"16.{suffix}"), pixels(tmp_path / "8.png"))


def test_images_of_unknown_scale_are_refused_with_the_name(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ValueError, match=r"f\.tiff: its values go from 0\.5 to 0\.5"):
        pixels(tmp_path / "f.tiff")


def test_a_recording_of_10_ms_is_heard_with_silence_behind_it(tmp_path: Path, caplog) -> None:
    path = tmp_path / "click.wav"
    soundfile.write(path, np.full(80, 0.5), 8000)
    with caplog.at_level("WARNING"):
        wave = read_audio({"path": str(path), "bytes": None}, 16_000, 1.0)
    assert f"{path}: 10 ms are less than the window of a model" in caplog.text
    assert len(wave) == 800 and not wave[160:].any() and wave[:160].any()
    kernels = {"conv_kernel": (10, 3, 3, 3, 3, 2, 2), "conv_stride": (5, 2, 2, 2, 2, 2, 2)}
    model = tiny("wav2vec2", **kernels, conv_dim=(16,) * 7, num_feat_extract_layers=7).eval()
    batch = AUDIO.batcher(Wav2Vec2FeatureExtractor(return_attention_mask=True))([{"wave": wave}])
    assert torch.isfinite(model(**batch).logits).all()


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=64), 64),
        (RobertaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=16,
                       intermediate_size=8, max_position_embeddings=64), 62),
        (AutoConfig.for_model("llama", max_position_embeddings=64), None),
        (AutoConfig.for_model("t5"), None),
    ],
)  # fmt: skip
def test_texts_longer_than_the_positions_are_refused_where_the_tokenizer_has_no_limit(
    config, most: int | None
) -> None:
    fits = DataConfig(dataset_name="any", max_seq_length=most or 100)
    TEXT.check_model(config, fits)
    if most is not None:
        with pytest.raises(ValueError, match=f"max_seq_length {most + 1} is more than the {most}"):
            TEXT.check_model(config, DataConfig(dataset_name="any", max_seq_length=most + 1))


def test_a_tokenizer_without_a_token_to_pad_with_is_refused(tmp_path: Path) -> None:
    folder = text_model(tmp_path / "model")
    for name in ("tokenizer_config.json",):
        own = json.loads((folder / name).read_text())
        own = {k: v for k, v in own.items() if not k.endswith("_token")} | {"pad_token": None}
        own["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / name).write_text(json.dumps(own))
    with pytest.raises(ValueError, match="neither a padding nor an end-of-text token"):
        TEXT.load_processor(str(folder), AutoConfig.from_pretrained(folder))
