"""A blueprint comes from outside: whatever does not fit the model is refused."""

import json

import pytest
from models import tiny
from transformers import AutoModelForSequenceClassification, BertConfig

from hfslim.hub.format import modeling_hfslim
from hfslim.hub.format.modeling_hfslim import BlueprintError, apply_blueprint

LAYER = "bert.encoder.layer.0"
DAMAGES = {
    "no blueprint": (None, "version None"),
    "no mapping": ([1], r"version \[1\]"),
    "other version": ({"version": 2}, "version 2, expected 1"),
    "unknown part": ({"version": 1, "code": {}}, r"unknown parts \['code'\]"),
    "part of another form": ({"version": 1, "shapes": {LAYER: 3}}, "must map paths to lists"),
    "part that is a list": ({"version": 1, "layers": []}, "must map paths to lists"),
    "missing path": (
        {"version": 1, "shapes": {"bert.nowhere.weight": [1]}},
        "names 'bert.nowhere', which BertForSequenceClassification lacks",
    ),
    "path out of the model": (
        {"version": 1, "attributes": {"bert.forward": {"__code__": 1}}},
        "names 'bert.forward'",
    ),
    "missing parameter": (
        {"version": 1, "shapes": {f"{LAYER}.output.dense.scale": [1]}},
        "the stock model has None",
    ),
    "growing shape": (
        {"version": 1, "shapes": {f"{LAYER}.output.dense.weight": [32, 49]}},
        r"the stock model has \[32, 48\]",
    ),
    "shape of other rank": (
        {"version": 1, "shapes": {f"{LAYER}.output.dense.weight": [32]}},
        "cannot get the shape",
    ),
    "negative shape": (
        {"version": 1, "shapes": {f"{LAYER}.output.dense.weight": [32, -1]}},
        "cannot get the shape",
    ),
    "non-integer shape": (
        {"version": 1, "shapes": {f"{LAYER}.output.dense.weight": [32, 2.5]}},
        "cannot get the shape",
    ),
    "no such layer": ({"version": 1, "layers": {"bert.encoder.layer": [0, 3]}}, "not among those"),
    "layer twice": ({"version": 1, "layers": {"bert.encoder.layer": [0, 0]}}, "not among those"),
    "layer as text": ({"version": 1, "layers": {"bert.encoder.layer": ["0"]}}, "not among those"),
    "no layer": ({"version": 1, "layers": {"bert.encoder.layer": []}}, "not among those"),
    "layers of no list": ({"version": 1, "layers": {"bert.encoder": [0]}}, "not among those"),
    "private attribute": (
        {"version": 1, "attributes": {LAYER: {"_forward_hooks": {}}}},
        "no setting '_forward_hooks'",
    ),
    "new attribute": (
        {"version": 1, "attributes": {LAYER: {"forward": "os.system"}}},
        "no setting 'forward'",
    ),
    "attribute of another type": (
        {"version": 1, "attributes": {f"{LAYER}.attention.self": {"num_attention_heads": "4"}}},
        "no setting 'num_attention_heads' that could become '4'",
    ),
    "huge attribute": (
        {"version": 1, "attributes": {f"{LAYER}.attention.self": {"num_attention_heads": 1 << 40}}},
        "cannot become 1099511627776",
    ),
    "growing attribute": (
        {"version": 1, "attributes": {f"{LAYER}.attention.self": {"num_attention_heads": 5}}},
        "cannot become 5: the stock model has 4",
    ),
    "negative attribute": (
        {"version": 1, "attributes": {f"{LAYER}.attention.self": {"num_attention_heads": -1}}},
        "cannot become -1",
    ),
    "number that is none": (
        {"version": 1, "attributes": {"bert.embeddings.LayerNorm": {"eps": float("nan")}}},
        "no setting 'eps' that could become nan",
    ),
    "text": (
        {"version": 1, "attributes": {"": {"name_or_path": "/etc"}}},
        "no setting 'name_or_path'",
    ),
    "growing tuple": (
        {"version": 1, "attributes": {"bert.embeddings.LayerNorm": {"normalized_shape": [33]}}},
        r"cannot become \(33,\)",
    ),
    "tuple of another length": (
        {"version": 1, "attributes": {"bert.embeddings.LayerNorm": {"normalized_shape": [8, 4]}}},
        r"cannot become \(8, 4\)",
    ),
    "tuple of texts": (
        {"version": 1, "attributes": {"bert.embeddings.LayerNorm": {"normalized_shape": ["32"]}}},
        "cannot become",
    ),
    "absurd shape": (
        {"version": 1, "shapes": {f"{LAYER}.output.dense.weight": [10**15, 10**15]}},
        "cannot get the shape",
    ),
    "unknown class": (
        {"version": 1, "replaced": {f"{LAYER}.attention.self": {"by": "subprocess.Popen"}}},
        "replaced by 'subprocess.Popen'",
    ),
    "class of an earlier version": (
        {"version": 1, "replaced": {f"{LAYER}.attention.self": {"by": "ConvBertHeads"}}},
        "hfslim 0.1.0 was the last to have: .* trust_remote_code=True",
    ),
    "class that is no name": (
        {"version": 1, "replaced": {f"{LAYER}.attention.self": {"by": ["Headless"]}}},
        r"replaced by \['Headless'\]",
    ),
    "unknown setting": (
        {
            "version": 1,
            "replaced": {f"{LAYER}.attention.self": {"by": "Headless", "forward": "x"}},
        },
        "cannot be replaced with forward='x'",
    ),
    "endless result": (
        {
            "version": 1,
            "replaced": {f"{LAYER}.attention.self": {"by": "Headless", "returns": 1 << 40}},
        },
        "cannot be replaced with returns=1099511627776",
    ),
    "missing projection": (
        {
            "version": 1,
            "replaced": {f"{LAYER}.attention.self": {"by": "Headless", "output": "o_proj"}},
        },
        "has no module 'o_proj'",
    ),
    "heads in disorder": (
        {
            "version": 1,
            "replaced": {f"{LAYER}.attention.self": {"by": "BiasedHeads", "kept_heads": [1, 0]}},
        },
        r"keeps heads \[1, 0\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_blueprint_is_refused(damage, tmp_path):
    blueprint, message = DAMAGES[damage]
    with pytest.raises(BlueprintError, match=message):
        apply_blueprint(tiny("bert"), blueprint)

    model = tiny("bert")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"hfslim": blueprint, "quantization_config": {"quant_method": "hfslim"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BlueprintError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(BlueprintError, match=message):
        modeling_hfslim.SlimBertForSequenceClassification.from_pretrained(tmp_path)


def test_a_config_that_lost_its_blueprint_is_refused_without_hfslim_too():
    small = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(BlueprintError, match=r"version None.*config\.json is damaged"):
        modeling_hfslim.SlimBertForSequenceClassification(small)
