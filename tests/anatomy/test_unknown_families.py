"""Families that hfslim has never heard of: found by usual names and shapes, or refused by name."""

import re

import pytest
import sweep
import torch
from places import ROOT
from structures import Unchanged, uneven
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

import hfslim
from hfslim.anatomy import families, feed_forwards
from hfslim.anatomy.discovery import find_units


class OwnConfig(PreTrainedConfig):
    model_type = "own"

    def __init__(self, usual=True, width=32, depth=3, **kwargs):
        self.usual, self.width, self.depth = usual, width, depth
        self.vocab_size = 64
        super().__init__(**kwargs)


class Attention(nn.Module):
    def __init__(self, config, names):
        super().__init__()
        self.num_heads, self.head_dim = 4, config.width // 4
        self.names = names
        for name in names:
            setattr(self, name, nn.Linear(config.width, config.width))

    def forward(self, hidden_states):
        query, key, value = (
            getattr(self, name)(hidden_states)
            .view(*hidden_states.shape[:2], self.num_heads, self.head_dim)
            .transpose(1, 2)
            for name in self.names[:3]
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return getattr(self, self.names[3])(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, config, attention, feed_forward):
        super().__init__()
        self.attention = Attention(config, attention)
        self.names = feed_forward
        setattr(self, feed_forward[0], nn.Linear(config.width, 48))
        setattr(self, feed_forward[1], nn.Linear(48, config.width))

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.attention(hidden_states)
        first, second = (getattr(self, name) for name in self.names)
        return hidden_states + second(nn.functional.gelu(first(hidden_states)))


class OwnForSequenceClassification(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        names = (("q_proj", "k_proj", "v_proj", "out_proj"), ("fc1", "fc2"))
        if not config.usual:
            names = (("asks", "is_asked", "tells", "joins"), ("widens", "narrows"))
        self.embeddings = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config, *names) for _ in range(config.depth))
        self.classifier = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **_):
        hidden_states = self.embeddings(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return SequenceClassifierOutput(logits=self.classifier(hidden_states.mean(1)))


def _own(**fields):
    torch.manual_seed(0)
    model = OwnForSequenceClassification(OwnConfig(num_labels=3, pad_token_id=0, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@torch.no_grad()
def test_usual_names_are_pruned_by_discovery_alone(tmp_path):
    model = _own()
    sizes = [(site.kind, site.size) for site in find_units(model)]
    assert sorted(set(sizes)) == [("heads", 4), ("layers", 3), ("neurons", 48)]
    inputs = {"input_ids": torch.randint(1, 64, (3, 12))}
    structure = uneven(model)
    with hfslim.gated(model, structure):
        expected = model(**inputs).logits
    found = hfslim.shrink(model, structure)(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    again = OwnForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-5, rtol=0)
    second = uneven(again, seed=1, drop_layer=False)
    with hfslim.gated(again, second):
        expected = again(**inputs).logits
    found = hfslim.shrink(again, second)(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "lacking"),
    [("heads", "'q_proj', 'k_proj', 'v_proj'"), ("neurons", "'fc1' and 'fc2'"), ("layers", "List")],
)
def test_unusual_names_are_refused_with_what_was_not_found_and_the_guide(kind, lacking):
    model = _own(usual=False)
    example = {"input_ids": torch.ones(1, 8, dtype=torch.long), "labels": torch.zeros(1).long()}
    with Unchanged(model), pytest.raises(ValueError, match=lacking) as error:
        hfslim.prune(model, [example], target={"sparsity": 0.5}, units=[kind])
    assert "docs/add_a_family.md" in str(error.value)


def build(_: str) -> OwnForSequenceClassification:
    return _own(usual=False)


def test_the_template_of_the_guide_teaches_a_family(monkeypatch, tmp_path):
    monkeypatch.setattr(families, "ATTENTIONS", dict(families.ATTENTIONS))
    known = list(feed_forwards.FEED_FORWARDS)
    for module in (families, feed_forwards):
        monkeypatch.setattr(module, "FEED_FORWARDS", known)
    guide = (ROOT / "docs" / "add_a_family.md").read_text()
    template = re.search(r"```python\n(from hfslim.anatomy.families.*?)```", guide, re.DOTALL)[1]
    assert template.count("\n") < 20
    exec(template, {})
    rows = list(sweep.sweep(f"{__name__}:build"))
    assert {(row.kind, row.outcome) for row in rows} == {
        ("heads", "exact"),
        ("neurons", "exact"),
        ("channels", "absent"),
        ("experts", "absent"),
        ("dimensions", "absent"),
        ("layers", "exact"),
        ("heads+neurons+layers", "exact"),
    }
