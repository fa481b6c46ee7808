"""Data sets from the Hub, files or folders, and the embedded digits."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import soundfile
from PIL import Image
from sklearn.datasets import load_digits
from transformers.utils import logging

logger = logging.get_logger(__name__)

BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
DIGITS = "digits"


@dataclass(frozen=True)
class DataConfig:
    """Source of the examples; the names are those of the transformers example scripts.

    Attributes:
        dataset_name: Hub id, local data set folder, or `digits` (scikit-learn's, no download).
        dataset_config_name: Configuration of the Hub data set.
        train_file: A csv, json, jsonl or parquet file or its address (`hf://…`, `https://…`);
            likewise `validation_file`, `test_file`.
        train_dir: Folder of images or recordings, one subfolder per class.
        validation_dir: As `train_dir`.
        text_column_name: Column of the text; by default `text` or `sentence`.
        text_pair_column_name: Column of the second text of a pair.
        image_column_name: Column of the image; by default `image` or `img`.
        audio_column_name: Column of the recording; by default `audio`.
        label_column_name: Column of the label; by default `label` or `labels`.
        train_split_name: Split to train on.
        eval_split_name: Split to evaluate on.
        train_val_split: Fraction of the training split, in (0, 1), to evaluate on instead.
        max_train_samples: Number of training examples to use, drawn by the seed.
        max_eval_samples: Number of evaluation examples to use, drawn by the seed.
        max_seq_length: Tokens after which a text is cut.
        max_length_seconds: Seconds after which a recording is cut.
    """

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    train_dir: str | None = None
    validation_dir: str | None = None
    text_column_name: str | None = None
    text_pair_column_name: str | None = None
    image_column_name: str | None = None
    audio_column_name: str | None = None
    label_column_name: str | None = None
    train_split_name: str = "train"
    eval_split_name: str = "validation"
    train_val_split: float | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    max_seq_length: int = 128
    max_length_seconds: float = 20.0

    def __post_init__(self) -> None:
        given = [n for n in ("dataset_name", "train_file", "train_dir") if getattr(self, n)]
        if len(given) != 1:
            raise ValueError(
                "data needs exactly one of dataset_name, train_file and train_dir, "
                f"got {given or 'none'}"
            )
        if self.train_val_split is not None and not 0 < self.train_val_split < 1:
            raise ValueError(f"train_val_split must lie in (0, 1), got {self.train_val_split}")
        held_out = self.validation_file or self.validation_dir
        if self.train_val_split is not None and held_out:
            raise ValueError(f"give either train_val_split or {held_out!r}, not both")
        for name in ("max_train_samples", "max_eval_samples", "max_seq_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.max_length_seconds <= 0:
            raise ValueError(f"max_length_seconds must be positive, got {self.max_length_seconds}")
        self._check_files()

    def _check_files(self) -> None:
        files = {n: getattr(self, n) for n in ("train_file", "validation_file", "test_file")}
        for name, value in files.items():
            if value and "://" not in value and not Path(value).is_file():
                raise FileNotFoundError(f"{name}: no file {value!r} in {Path.cwd()}")
            if value and Path(value).suffix.lower() not in BUILDERS:
                raise ValueError(f"{name}: {value!r} must end in one of {sorted(BUILDERS)}")
        if len({BUILDERS[Path(v).suffix.lower()] for v in files.values() if v}) > 1:
            raise ValueError(f"the data files must be of one kind, got {files}")
        for name in ("train_dir", "validation_dir"):
            value = getattr(self, name)
            if value and not Path(value).is_dir():
                raise FileNotFoundError(f"{name}: no folder {value!r} in {Path.cwd()}")


def load_splits(
    data: DataConfig, folder_builder: str | None, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Load the training and the evaluation examples, before any cut by `max_…_samples`.

    The builder of `train_dir` is `imagefolder` or `audiofolder`; the seed is for `train_val_split`.

    Raises:
        ValueError: A split does not exist or is empty, or there is nothing to evaluate on.
    """
    try:
        loaded = _load(data, folder_builder)
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(
            f"the data are empty, a split needs at least one example: {error}"
        ) from error
    train = _split(loaded, data.train_split_name, "train_split_name")
    if data.train_val_split is not None:
        label = data.label_column_name or "label"
        stratify = isinstance(train.features.get(label), datasets.ClassLabel)
        parts = train.train_test_split(
            test_size=data.train_val_split,
            seed=seed,
            stratify_by_column=label if stratify else None,
        )
        return parts["train"], parts["test"]
    return train, _split(loaded, data.eval_split_name, "eval_split_name")


def _load(data: DataConfig, folder_builder: str | None) -> datasets.DatasetDict:
    if data.dataset_name == DIGITS:
        return digits()
    if data.dataset_name:
        return datasets.load_dataset(data.dataset_name, data.dataset_config_name)
    if data.train_file:
        named = {s: getattr(data, f"{s}_file") for s in ("train", "validation", "test")}
        files = {split: path for split, path in named.items() if path}
        builder = BUILDERS[Path(data.train_file).suffix.lower()]
        return datasets.load_dataset(builder, data_files=files)
    if folder_builder is None:
        raise ValueError("train_dir holds images or recordings; texts come by train_file")
    folders = {"train": data.train_dir, "validation": data.validation_dir}
    given = {split: Path(path) for split, path in folders.items() if path}
    if folder_builder == "audiofolder":
        return audio_folders(given)
    patterns = {split: str(path / "**") for split, path in given.items()}
    return datasets.load_dataset(folder_builder, data_files=patterns)


def audio_folders(folders: dict[str, Path]) -> datasets.DatasetDict:
    """List the recordings of each split's folder, with one subfolder per class, not decoded.

    The `audiofolder` builder of datasets does the same, but needs torchcodec even to list.

    Raises:
        ValueError: A folder has no recordings in subfolders.
    """
    suffixes = {f".{name.lower()}" for name in soundfile.available_formats()}
    found = {}
    for split, folder in folders.items():
        paths = sorted(p for p in folder.glob("*/**/*") if p.suffix.lower() in suffixes)
        if not paths:
            raise ValueError(
                f"the data are empty: no recordings in subfolders of {str(folder)!r}; "
                f"expected CLASS/NAME with one of {sorted(suffixes)}"
            )
        classes = [path.relative_to(folder).parts[0] for path in paths]
        found[split] = {"audio": list(map(str, paths)), "label": classes}
    names = sorted({name for columns in found.values() for name in columns["label"]})
    features = datasets.Features(
        {"audio": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    parts = {
        split: datasets.Dataset.from_dict(columns, features=features)
        for split, columns in found.items()
    }
    return datasets.DatasetDict(parts).cast_column("audio", datasets.Audio(decode=False))


def _split(loaded: datasets.DatasetDict, name: str, key: str) -> datasets.Dataset:
    if name not in loaded:
        share = ", or set train_val_split: 0.1" if key == "eval_split_name" else ""
        raise ValueError(
            f"the data have no split {name!r}, only {sorted(loaded)}{did_you_mean(name, loaded)}: "
            f"set {key}{share}"
        )
    if len(loaded[name]) == 0:
        raise ValueError(f"split {name!r} of the data is empty: it must have at least one example")
    return loaded[name]


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return the nearest known name as the end of a message; empty where none is near."""
    near = difflib.get_close_matches(given, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def sample(dataset: datasets.Dataset, size: int | None, seed: int) -> datasets.Dataset:
    """Return `size` examples drawn by the seed, or all if there are no more."""
    if size is None or size >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(size))


def find_column(
    dataset: datasets.Dataset,
    given: str | None,
    defaults: tuple[str, ...],
    key: str,
    holds: tuple[type, str] = (object, ""),
) -> str:
    """Return the column that the recipe's `key` gives, or the first default that exists.

    Raises:
        ValueError: There is no such column, or its feature is not of the type that it `holds`.
    """
    feature, called = holds
    for name in (given,) if given else defaults:
        if name in dataset.column_names:
            found = dataset.features[name]
            if not isinstance(found, feature):
                raise ValueError(f"column {name!r} holds {found}, not {called}: set {key}")
            return name
    hint = did_you_mean(given or defaults[0], dataset.column_names)
    raise ValueError(
        f"{key}: no column {given or ' or '.join(defaults)!r}, the data have "
        f"{dataset.column_names}{hint}"
    )


def check_complete(dataset: datasets.Dataset, column: str) -> None:
    """Raise ValueError for a text column with missing values."""
    missing = [i for i, value in enumerate(dataset[column]) if value is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(dataset)} rows are empty in column {column!r} "
            f"(the first is row {missing[0]}): remove them or fill them in"
        )


def digits() -> datasets.DatasetDict:
    """Return scikit-learn's 1,797 handwritten digits, 8×8 grey, one in five for evaluation.

    The split is stratified and always the same.
    """
    source = load_digits()
    grey = (source.images * (255 / 16)).round().astype(np.uint8)
    names = datasets.ClassLabel(names=[str(name) for name in source.target_names])
    whole = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(one) for one in grey], "label": source.target.tolist()},
        features=datasets.Features({"image": datasets.Image(), "label": names}),
    )
    parts = whole.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")
    return datasets.DatasetDict(train=parts["train"], validation=parts["test"])
