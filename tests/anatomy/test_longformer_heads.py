"""Longformer's heads run in a class of hfslim's once some are missing: the same figures."""

import torch
import zoo
from transformers import AutoModelForSequenceClassification

from hfslim.hub.format.modeling_hfslim import replace_class


@torch.no_grad()
def test_all_heads_give_what_the_stock_class_gives():
    config = zoo.tiny_config("longformer")
    config.attention_window = [4, 8, 4]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.randint(3, 96, (2, 21))
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "global_attention_mask": torch.zeros_like(ids),
        "output_attentions": True,
    }
    inputs["attention_mask"][0, -6:] = 0
    inputs["global_attention_mask"][0, [0, 5]] = 1
    inputs["global_attention_mask"][1, [0, 2, 20]] = 1
    expected = model(**inputs)
    for layer in model.longformer.encoder.layer:
        replace_class(layer.attention.self, "LongformerHeads", kept_heads=(0, 1, 2, 3))
    found = model(**inputs)
    assert (found.logits - expected.logits).abs().max() < 1e-6
    for name in ("attentions", "global_attentions"):
        for mine, stock in zip(found[name], expected[name], strict=True):
            assert (mine - stock).abs().max() < 1e-6, name
