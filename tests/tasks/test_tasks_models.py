"""Models get the labels of the data; a trained head is kept, and never replaced in silence."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EvalPrediction,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
)

from hfslim.anatomy.inputs import example_inputs
from hfslim.tasks import (
    TASKS,
    DataConfig,
    Labels,
    build_model,
    compute_metrics,
    load_model,
    make_config,
)
from hfslim.tasks.metrics import METRICS

TEXT = TASKS["text-classification"]
TINY = {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def labels(*names: str) -> Labels:
    return Labels("single_label_classification", names)


def save(folder: Path, *names: str) -> BertForSequenceClassification:
    model = build_model(TEXT, TINY, labels(*names))
    model.save_pretrained(folder)
    return model


def test_a_built_model_has_the_labels_of_the_data() -> None:
    config = build_model(TEXT, TINY, labels("no", "yes")).config
    assert config.id2label == {0: "no", 1: "yes"}
    assert config.problem_type == "single_label_classification"


def test_a_head_trained_on_the_same_labels_is_kept(tmp_path: Path) -> None:
    saved = save(tmp_path, "NO", "YES")
    model = load_model(TEXT, str(tmp_path), labels("no", "yes"), new_head=True)
    assert torch.equal(model.classifier.weight, saved.classifier.weight)


def test_another_number_of_labels_needs_training(tmp_path: Path) -> None:
    saved = save(tmp_path, "a", "b", "c")
    model = load_model(TEXT, str(tmp_path), labels("no", "yes"), new_head=True)
    assert model.classifier.weight.shape == (2, 16)
    word = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(model.state_dict()[word], saved.state_dict()[word])
    with pytest.raises(
        ValueError, match=r"\['a', 'b', 'c'\], the data have \['no', 'yes'\].*transfer"
    ):
        load_model(TEXT, str(tmp_path), labels("no", "yes"), new_head=False)


def test_a_model_without_a_head_must_be_trained(tmp_path: Path) -> None:
    save(tmp_path, "LABEL_0", "LABEL_1").bert.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks trained weights for .*classifier"):
        load_model(TEXT, str(tmp_path), labels("no", "yes"), new_head=False)


def test_an_unknown_model_type_has_a_near_name() -> None:
    with pytest.raises(ValueError, match="unknown 'brt'; did you mean 'bert'"):
        make_config({"model_type": "brt"})


def test_fields_that_a_config_renames_are_known() -> None:
    config = make_config({"model_type": "distilbert", "hidden_size": 8, "num_attention_heads": 2})
    assert (config.dim, config.n_heads) == (8, 2)
    assert isinstance(make_config({"model_type": "bert"}), BertConfig)


@pytest.mark.parametrize(
    ("name", "problem", "logits", "references", "expected"),
    [
        ("accuracy", "single_label_classification", [[2, 1], [0, 1], [3, 0]], [0, 1, 1], 2 / 3),
        ("f1_macro", "single_label_classification", [[2, 1], [0, 1], [3, 0]], [0, 1, 1], 2 / 3),
        ("f1_binary", "single_label_classification", [[1, 0], [0, 1], [0, 1]], [1, 1, 1], 0.8),
        (
            "matthews_correlation",
            "single_label_classification",
            [[1, 0], [0, 1], [1, 0], [0, 1]],
            [0, 1, 1, 1],
            1 / 3**0.5,
        ),
        ("pearson", "regression", [[1], [2], [3]], [2.0, 4.0, 6.0], 1.0),
        ("spearman", "regression", [[1], [2], [9]], [3.0, 2.0, 1.0], -1.0),
        ("accuracy", "multi_label_classification", [[1, -1], [1, 1]], [[1, 0], [1, 0]], 0.5),
        ("f1_macro", "multi_label_classification", [[1, -1], [1, 1]], [[1, 0], [1, 0]], 0.5),
    ],
)
def test_metrics_by_hand(name, problem, logits, references, expected) -> None:
    compute = compute_metrics(name, problem, len(logits[0]))
    result = compute(EvalPrediction(np.array(logits, float), np.array(references)))
    assert result == {name: pytest.approx(expected)}


def test_metrics_combine_as_evaluate_metrics_do() -> None:
    combined = evaluate.combine([METRICS["accuracy"](), METRICS["f1_binary"]()])
    result = combined.compute(predictions=[0, 1, 1], references=[1, 1, 1])
    assert result == pytest.approx({"accuracy": 2 / 3, "f1_binary": 0.8})


def test_f1_binary_needs_two_classes() -> None:
    with pytest.raises(ValueError, match="needs two classes, the data have 3: use 'f1_macro'"):
        compute_metrics("f1_binary", "single_label_classification", 3)


def test_costs_of_a_model_of_any_size_are_stated_for_what_its_processor_makes() -> None:
    task = TASKS["image-classification"]
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    made = {"size": {"height": 20, "width": 20}, "image_mean": [0.5], "image_std": [0.5]}
    side = task.stated_length(DataConfig(dataset_name="digits"), ViTImageProcessorPil(**made))
    inputs = example_inputs(ResNetForImageClassification(config), length=side)
    assert inputs["pixel_values"].shape == (1, 1, 20, 20)
