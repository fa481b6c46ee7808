"""Labels of model, data and teacher in every convention: the right accuracy, or a refusal."""

import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    TrainingArguments,
)

from hfslim.cli import main
from hfslim.pipeline.recipe import RecipeError, parse_recipe
from hfslim.pipeline.runner import run
from hfslim.pipeline.task_examples import TaskExamples
from hfslim.tasks import DataConfig

NAMES = ("awful", "middling", "great")
ORDER = (2, 0, 1)
WORDS = [f"{name}{i}" for name in NAMES for i in range(4)]
MODELS = {
    "names": NAMES,
    "other case": tuple(name.upper() for name in NAMES),
    "other order": tuple(NAMES[i] for i in ORDER),
    "LABEL_i": ("LABEL_0", "LABEL_1", "LABEL_2"),
    "ids": ("0", "1", "2"),
}
DATA = {
    "names": NAMES,
    "other case": tuple(name.title() for name in NAMES),
    "ids": (0, 1, 2),
    "strings of ids": ("0", "1", "2"),
    "subset of names": NAMES[::2],
    "subset of ids": (0, 2),
    "ClassLabel": NAMES,
}
CONFIRMED = {(model, data) for model in MODELS for data in DATA} - {
    ("other order", "ids"),
    ("other order", "strings of ids"),
    ("other order", "subset of ids"),
    *((m, d) for m in ("LABEL_i", "ids") for d in ("names", "other case", "subset of names")),
}
"""What is right without a key: equal names, numbers that are ids, and a `ClassLabel`'s numbers."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of models that tell the words of three classes apart, and of their data."""
    folder = tmp_path_factory.mktemp("labels")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizer(vocab={t: i for i, t in enumerate(vocabulary)}, model_max_length=128)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        num_labels=3,
        initializer_range=0.3,
    )
    model = BertForSequenceClassification(config).eval()
    inputs = tokenizer(WORDS, return_tensors="pt")
    classes = torch.arange(len(WORDS)) // 4
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        model(**inputs, labels=classes).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model(**inputs).logits.argmax(-1) == classes).all()
    head = model.classifier.weight.detach().clone(), model.classifier.bias.detach().clone()
    for kind, names in MODELS.items():
        order = list(ORDER if kind == "other order" else range(3))
        with torch.no_grad():
            model.classifier.weight.copy_(head[0][order])
            model.classifier.bias.copy_(head[1][order])
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: i for i, name in enumerate(names)}
        model.config.problem_type = None
        for part in (model, tokenizer):
            part.save_pretrained(folder / kind)
    for kind, labels in DATA.items():
        known = dict(zip((0, 2) if len(labels) == 2 else (0, 1, 2), labels, strict=True))
        rows = [(w, known[i // 4]) for i, w in enumerate(WORDS) if i // 4 in known] * 3
        data = datasets.Dataset.from_dict(
            dict(zip(("text", "label"), zip(*rows, strict=True), strict=True))
        )
        if kind == "ClassLabel":
            data = data.cast_column("label", datasets.ClassLabel(names=list(NAMES)))
        data.to_parquet(folder / f"{kind}.parquet")
    return folder


def source(places: Path, kind: str) -> dict:
    return dict.fromkeys(("train_file", "validation_file"), str(places / f"{kind}.parquet"))


def accuracy(places: Path, model: str, data: str, **rest) -> float:
    arguments = TrainingArguments(str(places / "out"), use_cpu=True, report_to="none")
    folder = str(places / model)
    config = DataConfig(**source(places, data), **rest)
    bench = TaskExamples.prepare("text-classification", config, None, 0, arguments, folder)
    loaded = bench.load_model(folder)
    predicted = bench.predict(loaded)
    assert bench.evaluate(loaded).metrics["accuracy"] == predicted.value
    return predicted.value


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("model", MODELS)
def test_a_model_and_data_give_the_right_accuracy_or_a_refusal(places, model, data) -> None:
    if (model, data) in CONFIRMED:
        assert accuracy(places, model, data) == 1.0
        return
    with pytest.raises(ValueError, match="set label_names in data") as error:
        accuracy(places, model, data)
    if data.startswith("subset"):
        given = ["0", "1", "2"] if "ids" in data else list(NAMES)
        given = [given[i] for i in ORDER] if model == "other order" else given
    else:
        given = json.loads(re.search(r"label_names: (\[.*?\]) fits", str(error.value))[1])
    assert accuracy(places, model, data, label_names=tuple(given)) == 1.0


def test_names_that_the_user_gives_are_checked_too(places) -> None:
    with pytest.raises(ValueError, match=r"below chance.*label_names: \[.*\] fits"):
        accuracy(places, "LABEL_i", "names", label_names=("great", "awful", "middling"))
    with pytest.raises(ValueError, match="label_names"):
        accuracy(places, "LABEL_i", "names", label_names=("great", "awful"))
    with pytest.raises(ValueError, match="label_names"):
        accuracy(places, "LABEL_i", "names", label_names=("great", "awful", "bad"))


QUICK = [("LABEL_i", "names", None), ("LABEL_i", "names", "LABEL_i"), ("other order", "ids", None)]
ALL = [
    (model, data, teacher)
    for model, data in (("LABEL_i", "names"), ("other order", "ids"))
    for teacher in (None, *MODELS)
]
SLOW = [pytest.param(*one, marks=pytest.mark.slow) for one in ALL if one not in QUICK]


@pytest.mark.parametrize(("model", "data", "teacher"), [*QUICK, *SLOW])
def test_a_recipe_recovers_from_a_teacher_of_any_convention(
    places, tmp_path, model, data, teacher
) -> None:
    order = NAMES if model == "LABEL_i" else [str(i) for i in ORDER]
    recipe = {
        "task": "text-classification",
        "model": str(places / model),
        "data": {**source(places, data), "label_names": order},
        "output_dir": str(tmp_path / "out"),
        "training": {"use_cpu": True, "save_strategy": "no", "max_steps": 1, "report_to": "none"},
        "stages": [
            {"prune": {"target": {"parameters": 0.95}, "max_examples": 8}},
            {"recover": {"teacher": str(places / teacher)} if teacher else {}},
        ],
    }
    try:
        run(parse_recipe(recipe))
    except (RecipeError, ValueError) as error:
        # The order of these is that of neither names nor ids of the data.
        assert (teacher, data) in {("LABEL_i", "names"), ("ids", "names"), ("other order", "ids")}
        assert re.search(r"id2label", str(error))
        return
    metrics = [
        s["metrics"] for s in json.loads((tmp_path / "out/manifest.json").read_text())["stages"]
    ]
    assert min(one["accuracy"] for one in metrics) > 0.6


@pytest.mark.parametrize(("chosen", "expected"), [(None, "great"), ("awful", "awful")])
def test_the_positive_class_is_the_datas_in_any_order_of_the_models(
    places, tmp_path, chosen, expected
) -> None:
    words = datasets.Dataset.from_dict(
        {
            "text": [*WORDS[:4], *WORDS[8:], *WORDS[8:]] * 3,
            "label": (["awful"] * 6 + ["great"] * 6) * 3,
        }
    )
    words.to_parquet(tmp_path / "two.parquet")
    files = dict.fromkeys(("train_file", "validation_file"), str(tmp_path / "two.parquet"))
    tokenizer = BertTokenizer.from_pretrained(places / "names")
    found = set()
    for number, order in enumerate(([0, 2], [2, 0])):
        model = BertForSequenceClassification.from_pretrained(places / "names")
        names = [NAMES[i] for i in order]
        head = model.classifier
        model.num_labels, model.config.id2label = 2, dict(enumerate(names))
        model.classifier = torch.nn.Linear(16, 2)
        with torch.no_grad():
            model.classifier.weight.copy_(head.weight[order])
            model.classifier.bias.copy_(head.bias[order])
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / str(number))
        bench = TaskExamples.prepare(
            "text-classification",
            DataConfig(**files, positive_label=chosen),
            "f1_binary",
            0,
            TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none"),
            str(tmp_path / str(number)),
        )
        found.add(round(bench.predict(bench.load_model(str(tmp_path / str(number)))).value, 9))
        assert bench.stated_data == f"evaluation, 36 examples, positive: {expected}"
    # 12 of 18 `awful` are told; 6 and all `great` are taken for `great`.
    assert found == {round(0.8 if expected == "awful" else 6 / 7, 9)}


def test_a_column_of_numbers_is_measured_by_pearson(places, tmp_path) -> None:
    values = datasets.Dataset.from_dict({"text": WORDS, "label": [i / 4 for i in range(12)]})
    values.to_parquet(tmp_path / "values.parquet")
    model = BertForSequenceClassification.from_pretrained(
        places / "names", num_labels=1, ignore_mismatched_sizes=True
    )
    for part in (model, BertTokenizer.from_pretrained(places / "names")):
        part.save_pretrained(tmp_path / "model")
    files = dict.fromkeys(("train_file", "validation_file"), str(tmp_path / "values.parquet"))
    recipe = {
        "task": "text-classification",
        "model": str(tmp_path / "model"),
        "data": files,
        "output_dir": str(tmp_path / "out"),
        "training": {"use_cpu": True, "report_to": "none"},
        "stages": [{"prune": {"target": {"parameters": 0.95}, "max_examples": 8}}],
    }
    run(parse_recipe(recipe))
    stage = json.loads((tmp_path / "out/manifest.json").read_text())["stages"][0]
    assert set(stage["metrics"]) == {"pearson", "loss"}
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["quality"][0]["metric"] == "pearson"
    with pytest.raises(RecipeError, match=r"accuracy.* does not suit regression"):
        run(parse_recipe({**recipe, "metric": "accuracy", "output_dir": str(tmp_path / "b")}))


def test_the_command_refuses_and_takes_the_key(places, tmp_path, capsys) -> None:
    command = ["prune", str(places / "LABEL_i"), "--target", "parameters=0.95"]
    command += ["--max-examples", "8", "--output", str(tmp_path / "out")]
    for key, path in source(places, "names").items():
        command += ["--data", f"{key}={path}"]
    with pytest.raises(SystemExit) as refused:
        main(command)
    assert refused.value.code == 2
    assert "set label_names in data" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit) as done:
        main([*command, "--data", 'label_names=["awful", "middling", "great"]'])
    assert done.value.code == 0
    saved = json.loads((tmp_path / "out/config.json").read_text())
    assert saved["id2label"] == {"0": "awful", "1": "middling", "2": "great"}
