"""Every way that loads a model takes its processor's padding token, and reads texts that fit."""

import json
from pathlib import Path

import pytest
import torch
from standins import LABELS, WORDS, text_file, text_model
from transformers import (
    BertTokenizer,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    GPT2Config,
    GPT2ForSequenceClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hfslim.cli import main
from hfslim.pipeline.opening import open_classifier
from hfslim.pipeline.recipe import parse_recipe
from hfslim.pipeline.runner import run
from hfslim.pipeline.schema import RecipeError

STEP = {"max_steps": 1, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}


def decoder(folder: Path, seed: int = 0, limit: int | None = None) -> str:
    """A GPT-2 whose tokenizer pads, and whose config has no padding token."""
    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = {token: index for index, token in enumerate((*specials, *WORDS))}
    torch.manual_seed(seed)
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": len(vocabulary)}
    config = GPT2Config(
        **sizes, n_positions=24, bos_token_id=2, eos_token_id=3, num_labels=2, id2label=LABELS
    )
    config.label2id = {name: index for index, name in LABELS.items()}
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    limits = {} if limit is None else {"model_max_length": limit}
    BertTokenizer(vocab=vocabulary, **limits).save_pretrained(folder)
    return str(folder)


def recipe_of(folder: Path, model: str, *stages: dict, **rest: object) -> dict:
    files = {f"{s}_file": str(text_file(folder / f"{s}.csv", 16)) for s in ("train", "validation")}
    return {
        "task": "text-classification",
        "model": model,
        "data": {**files, "max_seq_length": 20},
        "training": STEP,
        "stages": list(stages),
        "output_dir": str(folder / "out"),
        **rest,
    }


QUIET = {"allow_untrained_teacher": True}


def test_a_decoder_is_distilled_cut_recovered_and_measured(tmp_path: Path) -> None:
    model, teacher = decoder(tmp_path / "model"), decoder(tmp_path / "teacher", 1)
    stages = (
        {"distil": QUIET},
        {"prune": {"target": {"sparsity": {"heads": 0.5}}, "units": ["heads"], "max_examples": 4}},
        {"recover": QUIET},
        {"measure": {"batch_sizes": [2]}},
    )
    last = run(parse_recipe(recipe_of(tmp_path, model, *stages, teacher=teacher)))
    assert json.loads((last / "config.json").read_text())["pad_token_id"] == 0
    stages = ({"measure": {"batch_sizes": [2]}},)
    run(parse_recipe(recipe_of(tmp_path / "alone", model, *stages, teacher=teacher)))


@pytest.mark.parametrize(
    "arguments",
    [
        ("measure", "MODEL", "--batch-size", "2", "--calls", "1"),
        ("compare", "MODEL", "MODEL", "--batch-size", "2", "--calls", "1"),
        ("compare", "MODEL", "MODEL", "--batch-size", "2", "--calls", "1", *("--data", "a.csv")),
        ("inspect", "MODEL", "--data", "a.csv"),
        ("prune", "MODEL", "--target", "sparsity.heads=0.5", "--units", "heads", "--data", "a.csv",
         "--output", "cut"),
    ],
)  # fmt: skip
def test_every_verb_takes_the_padding_token(tmp_path: Path, monkeypatch, arguments) -> None:
    """With one csv, that is split."""
    model = decoder(tmp_path / "model")
    text_file(tmp_path / "a.csv", 32)
    monkeypatch.chdir(tmp_path)
    arguments = [model if one == "MODEL" else one for one in arguments]
    arguments += ["--data", "max_seq_length=20"] if "--data" in arguments else []
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code
    assert open_classifier(model)[1].config.pad_token_id == 0


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"text,label\n", "a.csv has a header"),
        (b"text;label\ngood;1\n", "a.csv separates its columns by ';'"),
        ("text,label\ncaf\xe9,x\n".encode("latin-1"), "a.csv is not UTF-8"),
    ],
)
def test_a_csv_that_cannot_be_read_is_a_wrong_question(
    tmp_path: Path, monkeypatch, capsys, content: bytes, told: str
) -> None:
    text_model(tmp_path / "model")
    (tmp_path / "a.csv").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "model", "--data", "a.csv", "--data", "max_seq_length=16"])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_texts_beyond_the_positions_are_refused_before_any_work(tmp_path: Path) -> None:
    model = decoder(tmp_path / "model")
    recipe = recipe_of(tmp_path, model, {"transfer": {}})
    recipe["data"]["max_seq_length"] = 25
    with pytest.raises(RecipeError, match="max_seq_length 25 is more than the 24 positions of th"):
        run(parse_recipe(recipe))
    assert not list((tmp_path / "out").glob("*-transfer"))
    stages = ({"distil": QUIET}, {"measure": {"length": 30}})
    recipe = recipe_of(tmp_path, model, *stages, teacher=decoder(tmp_path / "teacher", 1))
    with pytest.raises(RecipeError, match="length 30 is more than the 24 positions of GPT2"):
        run(parse_recipe(recipe))


def test_a_length_that_a_model_cannot_read_is_not_measured(tmp_path: Path, capsys) -> None:
    model = decoder(tmp_path / "model")
    for length, code in (("24", 0), ("100", 1)):
        with pytest.raises(SystemExit) as ended:
            main(["measure", model, "--length", length, "--batch-size", "1", "--calls", "1"])
        assert (ended.value.code or 0) == code
    printed = capsys.readouterr()
    assert "input_ids [1, 24]" in printed.out
    assert "length 100 is more than the 24 positions" in printed.err


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(RecipeError, match=r"model: the folder '.*/model' has no config\.json"):
        open_classifier(str(tmp_path / "model"))
    (tmp_path / "model" / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(RecipeError, match=r"Unrecognized model in .*/model\. .*model_type"):
        open_classifier(str(tmp_path / "model"))


def test_a_model_whose_forward_takes_no_labels_runs_through_a_recipe(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
    sizes |= {"intermediate_size": 24, "image_size": 8, "patch_size": 4}
    names = dict(enumerate(map(str, range(10))))
    config = DeiTConfig(**sizes, num_channels=1, id2label=names)
    DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path / "model")
    size = {"height": 8, "width": 8}
    processor = ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.5])
    processor.save_pretrained(tmp_path / "model")
    prune = {"target": {"sparsity": 0.3}, "units": ["neurons"], "max_examples": 8}
    recipe = {
        "task": "image-classification",
        "model": str(tmp_path / "model"),
        "data": {"dataset_name": "digits", "max_train_samples": 16, "max_eval_samples": 16},
        "training": STEP,
        "stages": [{"prune": {**prune, "criterion": "fisher"}}, {"recover": QUIET}],
        "output_dir": str(tmp_path / "out"),
    }
    last = run(parse_recipe(recipe))
    metrics = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"][-1]["metrics"]
    assert 0 <= metrics["accuracy"] <= 1
    cls = DeiTForImageClassificationWithTeacher
    assert isinstance(cls.from_pretrained(last), cls)
