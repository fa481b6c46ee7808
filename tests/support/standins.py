"""Tiny models and data under the names that the documentation uses, so that its commands run."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import soundfile
from models import tiny
from PIL import Image
from transformers import BertTokenizer, Wav2Vec2FeatureExtractor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

WORDS = ("a", "film", "plot", "good", "gripping", "dull", "bad", "the")
LABELS = {0: "negative", 1: "positive"}


def labelled(family: str, names: dict[int, str], **overrides: object):
    model = tiny(family, num_labels=len(names), **overrides)
    model.config.id2label = dict(names)
    model.config.label2id = {name: index for index, name in names.items()}
    return model


def text_model(folder: Path, seed: int = 0, length: int = 32) -> Path:
    """A BERT of three layers with a tokenizer of eight words, for `negative` and `positive`."""
    labelled("bert", LABELS, seed=seed, max_position_embeddings=length + 8).save_pretrained(folder)
    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = {token: index for index, token in enumerate((*specials, *WORDS))}
    BertTokenizer(vocab=vocabulary, model_max_length=length).save_pretrained(folder)
    return folder


def text_file(path: Path, rows: int = 16) -> Path:
    """A csv of texts and labels, as many `negative` as `positive`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        for i in range(rows):
            word, label = (("gripping", "positive"), ("dull", "negative"))[i % 2]
            writer.writerow((f"a {word} {WORDS[i % 3]}", label))
    return path


def text_data(folder: Path, config: str) -> Path:
    """A data set of texts with a configuration, as a folder that `load_dataset` reads."""
    for split, rows in (("train", 16), ("validation", 8)):
        text_file(folder / config / f"{split}.csv", rows).write_text(
            (folder / config / f"{split}.csv").read_text().replace("text,", "sentence,", 1)
        )
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n"
        f"  - split: train\n    path: {config}/train.csv\n"
        f"  - split: validation\n    path: {config}/validation.csv\n---\n"
    )
    return folder


def image_model(folder: Path, seed: int = 0) -> Path:
    """A ViT of three layers for the ten digits, with its processor."""
    names = {i: str(i) for i in range(10)}
    labelled("vit", names, seed=seed).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    ViTImageProcessorPil(size=size).save_pretrained(folder)
    return folder


def image_folder(folder: Path, names: tuple[str, ...] = ("0", "1"), each: int = 4) -> Path:
    """Grey images in a subfolder for each class."""
    for shade, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            grey = np.full((16, 16), 10 * i + 200 * shade // len(names), dtype=np.uint8)
            Image.fromarray(grey).convert("RGB").save(folder / name / f"{i}.png")
    return folder


def speech_model(folder: Path, names: tuple[str, ...] = ("no", "yes"), seed: int = 0) -> Path:
    """A Wav2Vec2 of three layers, with its feature extractor."""
    labelled("wav2vec2", dict(enumerate(names)), seed=seed).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=16_000).save_pretrained(folder)
    return folder


def speech_folder(folder: Path, names: tuple[str, ...] = ("no", "yes"), each: int = 4) -> Path:
    """Recordings of a quarter of a second in a subfolder for each class."""
    for pitch, name in enumerate(names, 1):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            time = np.arange(4000) / 16_000
            wave = 0.1 * np.sin(2 * np.pi * 200 * pitch * time + i)
            soundfile.write(folder / name / f"{i}.wav", wave, 16_000)
    return folder
