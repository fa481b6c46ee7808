"""Data sets from the Hub, files or folders, and the embedded digits."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
from datasets.exceptions import DatasetGenerationError
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers.utils import logging

logger = logging.get_logger(__name__)

BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
DIGITS = "digits"
_UNREADABLE = (DatasetGenerationError, ValueError)
HELD_OUT = 0.2
"""Share of the examples to evaluate on where the data are one file or folder."""


@dataclass(frozen=True)
class DataConfig:
    """Source of the examples; the names are those of the transformers example scripts.

    Attributes:
        dataset_name: Hub id, local data set folder, or `digits` (scikit-learn's, no download).
        dataset_config_name: Configuration of the Hub data set.
        train_file: A csv, json, jsonl or parquet file or its address (`hf://…`, `https://…`);
            likewise `validation_file`, `test_file`. Its images or recordings may be paths, relative
            to the file. Without a file or share to evaluate on, 20 % are drawn by the seed.
        train_dir: Folder of images or recordings, one subfolder per class; is split likewise.
        validation_dir: As `train_dir`.
        text_column_name: Column of the text; by default `text` or `sentence`.
        text_pair_column_name: Column of the second text of a pair.
        image_column_name: Column of the image; by default `image` or `img`.
        audio_column_name: Column of the recording; by default `audio`.
        label_column_name: Column of the label; by default `label` or `labels`.
        label_names: The data's labels in the order of the model's outputs; by default they are
            paired by name, by number or by position, and checked by the model's accuracy.
        positive_label: The class that `f1_binary` is about; by default the second of the data.
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
    label_names: tuple[str | int, ...] | None = None
    positive_label: str | int | None = None
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
    source = data.train_file or data.train_dir
    if source and len(loaded) == 1 and data.eval_split_name == DataConfig.eval_split_name:
        return _hold_out(train, data.label_column_name, source, seed)
    return train, _split(loaded, data.eval_split_name, "eval_split_name")


def _hold_out(
    whole: datasets.Dataset, label: str | None, source: str, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split the examples of one file, with the same share of each class where that can be."""
    if len(whole) < 2:
        raise ValueError(f"{source} has one example: it takes two, to train and to evaluate on")
    named = next((n for n in (label, "label", "labels") if n in whole.column_names), None)
    values = [] if named is None else list(whole[named])
    classes = Counter(values) if values and isinstance(values[0], str | int) else Counter()
    held = round(len(whole) * HELD_OUT) or 1
    even = len(classes) > 1 and min(classes.values()) > 1 and held >= len(classes)
    parts = train_test_split(
        range(len(whole)), test_size=held, random_state=seed, stratify=values if even else None
    )
    train, evaluation = (whole.select(sorted(part)) for part in parts)
    logger.info(
        "%s is all there is: of its %d examples, %d are to train and %d to evaluate on, drawn by "
        "seed %d%s; set validation_file or train_val_split for others",
        *(source, len(whole), len(train), len(evaluation), seed, " class by class" if even else ""),
    )
    return train, evaluation


def _load(data: DataConfig, folder_builder: str | None) -> datasets.DatasetDict:
    if data.dataset_name == DIGITS:
        return digits()
    if data.dataset_name:
        return datasets.load_dataset(data.dataset_name, data.dataset_config_name)
    if data.train_file:
        named = {s: getattr(data, f"{s}_file") for s in ("train", "validation", "test")}
        files = {split: path for split, path in named.items() if path}
        builder = BUILDERS[Path(data.train_file).suffix.lower()]
        return _read_files(builder, files)
    if folder_builder is None:
        raise ValueError("train_dir holds images or recordings; texts come by train_file")
    folders = {"train": data.train_dir, "validation": data.validation_dir}
    given = {split: Path(path) for split, path in folders.items() if path}
    if folder_builder == "audiofolder":
        return audio_folders(given)
    patterns = {split: str(path / "**") for split, path in given.items()}
    return datasets.load_dataset(folder_builder, data_files=patterns)


def _read_files(builder: str, files: dict[str, str]) -> datasets.DatasetDict:
    """Read data files; an error names the file and its cause."""
    for path in files.values():
        if "://" not in path:
            _check_text(Path(path), builder)
    try:
        return datasets.load_dataset(builder, data_files=files)
    except _UNREADABLE as error:
        for path in files.values():
            try:
                datasets.load_dataset(builder, data_files=path)
            except _UNREADABLE as own:
                cause: BaseException = own
                while cause.__cause__ is not None:
                    cause = cause.__cause__
                reason = " ".join(str(cause).split()) or type(cause).__name__
                raise ValueError(f"{path} cannot be read as {builder}: {reason}") from error
        raise ValueError(f"{[*files.values()]} do not have the same columns: {error}") from error


def _check_text(path: Path, builder: str) -> None:
    """Refuse a file without rows, one that is not UTF-8, and a csv of other separators.

    Raises:
        ValueError: The message names the file and the cause.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    if builder == "parquet":
        return
    lines: list[str] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8: byte 0x{line[error.start]:02x} in line {number}; save "
                    "it as UTF-8, such as by `iconv -f latin1 -t utf-8`"
                ) from error
            lines += [text] if text.strip() and len(lines) < 2 else []
    if not lines:
        raise ValueError(f"{path} is empty")
    if builder != "csv":
        return
    if "," not in lines[0] and (other := next((c for c in ";\t|" if c in lines[0]), None)):
        raise ValueError(
            f"{path} separates its columns by {other!r} ({lines[0].strip()!r}): save it with commas"
        )
    if len(lines) < 2:
        raise ValueError(f"{path} has a header ({lines[0].strip()!r}) and no rows")


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
    dataset: datasets.Dataset, given: str | None, defaults: tuple[str, ...], key: str
) -> str:
    """Return the column that the recipe's `key` gives, or the first default that exists.

    Raises:
        ValueError: There is no such column.
    """
    for name in (given,) if given else defaults:
        if name in dataset.column_names:
            return name
    hint = did_you_mean(given or defaults[0], dataset.column_names)
    raise ValueError(
        f"{key}: no column {given or ' or '.join(defaults)!r}, the data have "
        f"{dataset.column_names}{hint}"
    )


def open_paths(
    dataset: datasets.Dataset, column: str, feature: Any, file: str | None
) -> datasets.Dataset:
    """Return examples whose images or recordings are read undecoded; a file may hold their paths.

    Args:
        dataset: Raw examples.
        column: The column of the images or recordings.
        feature: `datasets.Image(decode=False)` or `datasets.Audio(decode=False)`.
        file: The data file that the examples come from, which paths are relative to.

    Raises:
        ValueError: The column holds something else, or files that do not exist.
    """
    found = dataset.features[column]
    if isinstance(found, type(feature)):
        return dataset.cast_column(column, feature)
    called = type(feature).__name__.lower()
    if file is None or getattr(found, "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"column {column!r} holds {found}, not {called} files: set {called}_column_name"
        )
    folder = Path() if "://" in file else Path(file).resolve().parent
    paths = [str(folder / (path or "")) for path in dataset[column]]
    missing = [number for number, path in enumerate(paths) if not Path(path).is_file()]
    if missing:
        raise ValueError(
            f"{file}: {len(missing)} of {len(paths)} rows name no file in column {column!r}, the "
            f"first is row {missing[0]}, {dataset[column][missing[0]]!r}: give paths relative to "
            f"{folder}, or set {called}_column_name"
        )
    features = datasets.Features({**dataset.features, column: datasets.Value("string")})
    table = dataset.to_dict() | {column: paths}
    return datasets.Dataset.from_dict(table, features=features).cast_column(column, feature)


def check_texts(dataset: datasets.Dataset, column: str) -> None:
    """Refuse a column that does not hold a text in every row; tell how many are blank.

    Raises:
        ValueError: A text is missing, or is something else.
    """
    values = list(dataset[column])
    missing = [i for i, value in enumerate(values) if value is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(dataset)} rows are empty in column {column!r} "
            f"(the first is row {missing[0]}): remove them or fill them in"
        )
    other = next((i for i, value in enumerate(values) if not isinstance(value, str)), None)
    if other is not None:
        raise ValueError(f"column {column!r} holds {values[other]!r} in row {other}, not a text")
    blank = [i for i, value in enumerate(values) if not value.strip()]
    if blank:
        logger.warning(
            "%d of %d texts in column %r are blank (the first is row %d): they are kept",
            *(len(blank), len(values), column, blank[0]),
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
