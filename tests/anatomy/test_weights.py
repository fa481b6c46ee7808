"""Which modules lose weights, and what is read off a model."""

import pytest
import torch
from models import tiny
from transformers import ResNetConfig, ResNetForImageClassification

from hfslim import weight_sparsity
from hfslim.anatomy.weights import find_weights
from hfslim.sparsity.weight_masks import SparsityGoal, remove

COUNTS = {
    "bert": 3 * 6 + 1,
    "distilbert": 3 * 6,
    "electra": 3 * 6,
    "deberta-v2": 3 * 8 + 1,
    "vit": 3 * 6,
    "wav2vec2": 3 + 1 + 3 * 6,
    "whisper": 2 + 3 * 6,
    "llama": 3 * 7,
}


@pytest.mark.parametrize("family", COUNTS)
def test_the_encoder_is_found_without_embeddings_and_head(family):
    model = tiny(family)
    found = find_weights(model)
    assert len(found) == COUNTS[family]
    assert not [path for path in found if "embed" in path or "classifier" in path]
    head = {"classifier", "score", "projector", "pre_classifier"}
    assert not head & {path.partition(".")[0] for path in found}


def test_convolutions_of_a_resnet_are_found_without_its_stem():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    found = find_weights(ResNetForImageClassification(config))
    assert found
    assert all(path.startswith("resnet.encoder.") for path in found)


def test_names_choose_modules_as_in_peft():
    model = tiny("bert")
    queries = find_weights(model, ["query"])
    assert list(queries) == [f"bert.encoder.layer.{i}.attention.self.query" for i in range(3)]
    assert list(find_weights(model, r".*\.[01]\..*query")) == list(queries)[:2]
    assert list(find_weights(model, ["classifier"])) == ["classifier"]
    rest = find_weights(model, exclude_modules=["query", "pooler.dense"])
    assert len(rest) == COUNTS["bert"] - 4


@pytest.mark.parametrize("argument", ["target_modules", "exclude_modules"])
def test_a_name_that_nothing_has_is_refused(argument):
    with pytest.raises(ValueError, match=rf"{argument}: .*'querry'; there are \['classifier'"):
        find_weights(tiny("bert"), **{argument: ["query", "querry"]})
    with pytest.raises(ValueError, match=argument):
        find_weights(tiny("bert"), **{argument: "querry"})


def test_leaving_everything_out_is_refused():
    with pytest.raises(ValueError, match="no linear layers or convolutions to prune"):
        find_weights(tiny("bert"), ["query"], ["query"])


def test_a_weight_shared_with_an_embedding_is_left_alone():
    model = tiny("bert")
    layer = model.bert.encoder.layer[0].intermediate.dense
    layer.weight = torch.nn.Parameter(torch.randn(64, 32))
    model.bert.embeddings.word_embeddings.weight = layer.weight
    assert "bert.encoder.layer.0.intermediate.dense" not in find_weights(model)


def test_sparsity_is_read_off_kind_by_kind(tmp_path):
    model = tiny("wav2vec2")
    assert {row.nonzero / row.weights for row in weight_sparsity(model)} == {1.0}
    attention = find_weights(model, ["q_proj", "k_proj", "v_proj", "out_proj"])
    scores = {path: module.weight.detach().abs() for path, module in attention.items()}
    zeros = {path: torch.zeros_like(score, dtype=torch.bool) for path, score in scores.items()}
    for path, zero in remove(scores, zeros, SparsityGoal.parse(None, "2:4")).items():
        attention[path].weight.data.masked_fill_(zero, 0)
    model.save_pretrained(tmp_path)
    rows = {row.kind: row for row in weight_sparsity(type(model).from_pretrained(tmp_path))}
    assert list(rows) == ["convolution", "other linear", "attention", "feed-forward", "all"]
    assert rows["attention"].weights == 3 * 4 * 32 * 32
    assert (rows["attention"].sparsity, rows["attention"].pattern) == (0.5, "2:4")
    assert (rows["feed-forward"].sparsity, rows["feed-forward"].pattern) == (0.0, "")
    everything = sum(module.weight.numel() for module in find_weights(model).values())
    assert (rows["all"].weights, rows["all"].pattern) == (everything, "")
    assert rows["all"].nonzero == everything - 3 * 4 * 32 * 16
