"""The example scripts of transformers with hfslim: what they save, their `--do_eval` evaluates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed.launch import launch
from transformers import AutoConfig, BertConfig, ViTConfig, Wav2Vec2Config

SCRIPT = Path(__file__).with_name("stock_example.py")
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
CONFIGS = {
    "text": BertConfig(**SMALL, vocab_size=16, max_position_embeddings=8),
    "image": ViTConfig(**SMALL, image_size=8, patch_size=4),
    "audio": Wav2Vec2Config(
        **{key: value for key, value in SMALL.items() if "prob" not in key},
        conv_dim=[8, 8],
        conv_stride=[10, 8],
        conv_kernel=[10, 8],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        mask_time_prob=0.0,
        layerdrop=0.0,
    ),
}
USES = ("prune", "distil", "both")


def start(folder: Path, kind: str, model: Path, *arguments: str, processes: int = 1) -> dict:
    given = ["--kind", kind, "--model_name_or_path", model, "--output_dir", folder, *arguments]
    if processes > 1:
        launch(SCRIPT, *given, processes=processes)
    else:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(SCRIPT), *map(str, given)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "metrics.json").read_text())


def save_base(folder: Path, kind: str) -> Path:
    from distributed.stock_example import AUTO

    config = CONFIGS[kind]
    config.id2label = {str(i): f"LABEL_{i}" for i in range(3)}
    config.label2id = {f"LABEL_{i}": str(i) for i in range(3)}
    AUTO[kind].from_config(config).save_pretrained(folder / "base")
    return folder / "base"


def check(folder: Path, kind: str, use: str, processes: int) -> None:
    base = save_base(folder, kind)
    flags = ["--prune"] if use != "distil" else []
    flags += ["--teacher", str(base)] if use != "prune" else []
    place = folder / "trained"
    trained = start(place, kind, base, "--do_train", "--do_eval", *flags, processes=processes)
    again = start(folder / "again", kind, place, "--do_eval")
    assert again["names"] == trained["names"] == ["bird", "cat", "owl"]
    assert again["parameters"] == trained["parameters"]
    assert again["accuracy"] == pytest.approx(trained["accuracy"], abs=1e-6)
    assert dict(AutoConfig.from_pretrained(place).id2label) == {0: "bird", 1: "cat", 2: "owl"}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "use", "processes"),
    [("text", "both", 2), ("image", "distil", 1), ("audio", "prune", 1)],
)
def test_what_a_stock_script_saves_its_evaluation_loads(tmp_path, kind, use, processes) -> None:
    check(tmp_path, kind, use, processes)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_all_stock_scripts_in_one_process_and_two(tmp_path, kind, use, processes) -> None:
    check(tmp_path, kind, use, processes)
