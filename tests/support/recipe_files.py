"""Recipes on tiny models and small data of each modality."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from transformers import BertTokenizer

STEP = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


STAGES = [
    {"transfer": {}},
    {"prune": {"target": {"macs": 0.6}, "max_examples": 4}},
    {"recover": {"allow_untrained_teacher": True}},
    {"measure": {"batch_sizes": [1]}},
]


WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


VIT = {
    "model_type": "vit",
    **WIDTHS,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
}


def recipe_of(folder: Path, task: str, config: dict, data: dict, **rest: Any) -> dict[str, Any]:
    return {
        "task": task,
        "model_config": config,
        "data": data,
        "training": STEP,
        "stages": STAGES,
        "output_dir": str(folder / "out"),
        **rest,
    }


def text_recipe(folder: Path) -> dict[str, Any]:
    words = ["good", "bad", "film", "plot"]
    (folder / "tokenizer").mkdir()
    vocabulary = {
        t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    }
    BertTokenizer(vocab=vocabulary, model_max_length=16).save_pretrained(folder / "tokenizer")
    for name in ("train", "held"):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = [(f"{w} film", "plot", "up" if w == "good" else "down") for w in words[:2] * 4]
            csv.writer(file).writerows([("a", "b", "verdict"), *rows])
    config = {
        "model_type": "bert",
        **WIDTHS,
        "intermediate_size": 32,
        "vocab_size": 9,
        "max_position_embeddings": 16,
    }
    data = {
        "train_file": str(folder / "train.csv"),
        "validation_file": str(folder / "held.csv"),
        "text_column_name": "a",
        "text_pair_column_name": "b",
        "label_column_name": "verdict",
        "max_seq_length": 12,
    }
    processor = str(folder / "tokenizer")
    return recipe_of(folder, "text-classification", config, data, processor=processor)


def image_recipe(folder: Path) -> dict[str, Any]:
    for split, name in ((s, n) for s in ("train", "held") for n in ("blue", "red")):
        (folder / split / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (9, 7), name).save(folder / split / name / f"{i}.png")
    data = {"train_dir": str(folder / "train"), "validation_dir": str(folder / "held")}
    return recipe_of(folder, "image-classification", VIT, data)


def audio_recipe(folder: Path) -> dict[str, Any]:
    for split, pitch in ((s, p) for s in ("train", "held") for p in (200, 900)):
        (folder / split / f"{pitch}Hz").mkdir(parents=True)
        for i in range(4):
            wave = np.sin(np.arange(4000 + 500 * i) * 2 * np.pi * pitch / 8000)
            soundfile.write(folder / split / f"{pitch}Hz" / f"{i}.wav", wave, 8000)
    config = {
        "model_type": "wav2vec2",
        **WIDTHS,
        "intermediate_size": 32,
        "conv_dim": [8, 8],
        "conv_stride": [10, 8],
        "conv_kernel": [10, 8],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "classifier_proj_size": 8,
        "mask_time_prob": 0.0,
        "layerdrop": 0.0,
    }
    data = {
        "train_dir": str(folder / "train"),
        "validation_dir": str(folder / "held"),
        "max_length_seconds": 0.5,
    }
    return recipe_of(folder, "audio-classification", config, data)
