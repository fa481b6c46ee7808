"""Data sets, labels and columns: what is read, and what is refused."""

import csv
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
from PIL import Image

from hfslim.tasks import TASKS, DataConfig
from hfslim.tasks.audio import read_audio
from hfslim.tasks.data import digits
from hfslim.tasks.labels import find_labels


def column(values: list, feature: object = None) -> datasets.Dataset:
    features = datasets.Features({"label": feature}) if feature else None
    return datasets.Dataset.from_dict({"label": values}, features=features)


def write_csv(path: Path, rows: list[tuple], header: tuple = ("text", "label")) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


@pytest.mark.parametrize(
    ("values", "feature", "problem", "names", "encoded"),
    [
        (
            [1, 0],
            datasets.ClassLabel(names=["cat", "dog"]),
            "single_label_classification",
            ("cat", "dog"),
            [1, 0],
        ),
        (["b", "a", "b"], None, "single_label_classification", ("a", "b"), [1, 0, 1]),
        ([10, 2, 10], None, "single_label_classification", ("2", "10"), [1, 0, 1]),
        ([True, False], None, "single_label_classification", ("False", "True"), [1, 0]),
        ([0.5, 2.0], None, "regression", ("label",), [0.5, 2.0]),
        ([[1, 0, 1], [0, 0, 0]], None, "multi_label_classification", ("0", "1", "2"), None),
        (
            [["x", "z"], [], ["y"]],
            None,
            "multi_label_classification",
            ("x", "y", "z"),
            [[1, 0, 1], [0, 0, 0], [0, 1, 0]],
        ),
        (
            [[1], [0, 1]],
            datasets.List(datasets.ClassLabel(names=["p", "q"])),
            "multi_label_classification",
            ("p", "q"),
            [[0, 1], [1, 1]],
        ),
    ],
)
def test_labels_are_read_off_the_column(values, feature, problem, names, encoded) -> None:
    data = column(values, feature)
    labels = find_labels(data, "label")
    assert (labels.problem, labels.names) == (problem, names)
    assert labels.encode(data["label"]) == (encoded or values)


def test_labels_follow_the_order_of_a_model_that_knows_them() -> None:
    labels = find_labels(column(["neg", "pos"]), "label")
    ordered = labels.paired(["POS", "NEG"])
    assert ordered.encode(["neg", "pos"]) == [1, 0]
    assert (ordered.names, ordered.by, ordered.positive) == (("pos", "neg"), "name", 0)
    with pytest.raises(ValueError, match=r"\['neg', 'pos'\] are not among \['pos', 'other'\]"):
        labels.paired(["pos", "other"])


def test_integers_that_are_ids_of_outputs_are_ids() -> None:
    labels = find_labels(column([0, 1, 1]), "label").paired(["NEGATIVE", "POSITIVE"])
    assert (labels.names, labels.by) == (("NEGATIVE", "POSITIVE"), "id")
    assert labels.encode([0, 1]) == [0, 1]
    flipped = find_labels(column([0, 1]), "label").paired(["POSITIVE", "NEGATIVE"], [1, 0])
    assert (flipped.names, flipped.by) == (("POSITIVE", "NEGATIVE"), "given")
    assert flipped.encode([0, 1]) == [1, 0]


def test_columns_of_vectors_follow_the_order_that_is_given() -> None:
    labels = find_labels(column([[0, 1, 1], [1, 0, 0]]), "label")
    ordered = labels.paired(["a", "b", "c"], [2, 0, 1])
    assert ordered.names == ("a", "b", "c")
    assert ordered.encode([[0, 1, 0]]) == [[0.0, 0.0, 1.0]]
    assert labels.paired(["a", "b", "c"]).encode([[0, 1, 0]]) == [[0.0, 1.0, 0.0]]


def test_whole_numbers_are_values_for_a_model_with_one_output() -> None:
    labels = find_labels(column([1, 5, 3]), "label").paired(["LABEL_0"])
    assert labels.problem == "regression"
    assert labels.encode([5]) == [5.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None], "1 of 2 rows have no label"),
        (["a", "a"], "one label only"),
        ([[0, 1], [1]], "0/1 vectors of one length"),
    ],
)
def test_unusable_labels_are_refused(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        find_labels(column(values), "label")


def test_an_unlabelled_hub_split_is_refused() -> None:
    labels = find_labels(column([0, 1], datasets.ClassLabel(names=["a", "b"])), "label")
    with pytest.raises(ValueError, match="choose a split that has labels"):
        labels.encode([-1])


def test_digits_are_all_there_and_the_split_never_changes() -> None:
    first, second = digits(), digits()
    assert (len(first["train"]), len(first["validation"])) == (1437, 360)
    assert first["train"]["label"][:50] == second["train"]["label"][:50]
    assert np.asarray(first["train"][0]["image"]).shape == (8, 8)
    assert set(first["validation"]["label"]) == set(range(10))


def test_a_missing_file_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train_file: no file .*absent\.csv"):
        DataConfig(train_file=str(tmp_path / "absent.csv"))


def test_one_source_of_data_is_needed() -> None:
    with pytest.raises(ValueError, match=r"exactly one of .* got none"):
        DataConfig()


def test_a_missing_column_names_those_that_exist(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [("x", "p"), ("y", "q")], ("tweet", "label"))
    data = DataConfig(train_file=path, train_val_split=0.5, text_column_name="twet")
    with pytest.raises(
        ValueError, match=r"no column 'twet'.*'tweet', 'label'.*did you mean 'tweet'"
    ):
        TASKS["text-classification"].load_examples(data, seed=0)


def test_an_evaluation_label_that_training_lacks_is_refused(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv", [("x", "p"), ("y", "q")])
    held = write_csv(tmp_path / "b.csv", [("z", "r")])
    with pytest.raises(ValueError, match=r"evaluation split.*'r' is not among.*'p', 'q'"):
        TASKS["text-classification"].load_examples(
            DataConfig(train_file=train, validation_file=held), seed=0
        )


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv", [])
    with pytest.raises(ValueError, match=r"a\.csv has a header \('text,label'\) and no rows"):
        TASKS["text-classification"].load_examples(
            DataConfig(train_file=train, train_val_split=0.5), seed=0
        )


def test_empty_texts_are_refused_with_their_place(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv", [("x", "p"), ("", "q"), ("z", "q")])
    held = write_csv(tmp_path / "b.csv", [("x", "p")])
    with pytest.raises(ValueError, match=r"1 of 3 rows are empty in column 'text'.*row 1"):
        TASKS["text-classification"].load_examples(
            DataConfig(train_file=train, validation_file=held), seed=0
        )


def test_a_missing_split_suggests_what_to_set(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv", [("x", "p"), ("y", "q")])
    with pytest.raises(ValueError, match=r"no split 'test', only \['train'\].*train_val_split"):
        TASKS["text-classification"].load_examples(
            DataConfig(train_file=train, eval_split_name="test"), seed=0
        )


def test_an_image_folder_gives_one_class_per_subfolder(tmp_path: Path) -> None:
    for name in ("blue", "red"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (6, 6), name).save(tmp_path / name / f"{i}.png")
    examples = TASKS["image-classification"].load_examples(
        DataConfig(train_dir=str(tmp_path), train_val_split=0.25, max_train_samples=5), seed=0
    )
    assert examples.labels.names == ("blue", "red")
    assert (len(examples.train), len(examples.evaluation)) == (5, 2)


def test_audio_is_cut_mixed_to_one_channel_and_resampled(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.full((8000, 2), [0.5, 0.1]), 8000)
    wave = read_audio({"path": str(path), "bytes": None}, rate=16000, max_seconds=0.5)
    assert wave.shape == (8000,)
    assert wave.dtype == np.float32
    assert wave[4000] == pytest.approx(0.3, abs=0.01)


def test_a_damaged_recording_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"a\.wav: not a sound file"):
        read_audio({"path": str(path), "bytes": None}, rate=16000, max_seconds=1)


def test_a_folder_without_recordings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match=r"the data are empty: no recordings.*CLASS/NAME"):
        TASKS["audio-classification"].load_examples(
            DataConfig(train_dir=str(tmp_path), train_val_split=0.5), seed=0
        )
