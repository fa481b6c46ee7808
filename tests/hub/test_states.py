"""What is saved loads, whatever state the model was in, and by every way in and out."""

import json
import os
import subprocess
import sys

import pytest
import torch
from models import auto_class, tiny
from places import SUPPORT
from structures import uneven
from torch import nn
from transformers import AutoConfig, AutoModel

import hfslim
from hfslim.anatomy.inputs import example_inputs

FAMILIES = (
    *("bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert", "mpnet", "vit"),
    *("deit", "dinov2", "beit", "swin", "wav2vec2", "hubert", "wavlm"),
    *("audio-spectrogram-transformer", "whisper", "llama", "qwen2", "qwen3"),
)
ATTENTION = {"attn_implementation": "eager"}


def checkpointed(model):
    if not model.supports_gradient_checkpointing:
        pytest.skip("the family has no gradient checkpointing")
    model.gradient_checkpointing_enable()
    return model


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and type(value) is float:
                setattr(module, name, 0.0)
    return model


def tied(model):
    embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        pytest.skip("the model has no embeddings of words")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def resized(model):
    if not isinstance(model.get_input_embeddings(), nn.Embedding) or not model.can_resize:
        pytest.skip("the model has no embeddings of words")
    model.resize_token_embeddings(model.config.vocab_size + 7, mean_resizing=False)
    return model


def with_lora(model):
    peft = pytest.importorskip("peft")
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][:4]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.add_(0.05)
    return hfslim.merge_adapters(adapted).eval()


def sharing_its_config(model):
    other = type(model)(model.config)
    other.config = model.config
    model.other = [other]  # In a list, so that it is no part of the model.
    return model


def cut_before(model):
    return hfslim.shrink(model, uneven(model, seed=1, drop_layer=False))


STATES = {
    "checkpointed": checkpointed,
    "no dropout": without_dropout,
    "training": lambda model: model.train(),
    "bf16": lambda model: model.to(torch.bfloat16),
    "frozen": lambda model: model.requires_grad_(False),
    "tied": tied,
    "resized": resized,
    "lora": with_lora,
    "shared config": sharing_its_config,
    "shards": lambda model: model,
    "cut twice": cut_before,
}
ALL = [(family, state) for family in FAMILIES for state in STATES]
SLICE = [(FAMILIES[i % 20], state) for i, state in enumerate(STATES)]
SLICE += [("llama", "checkpointed"), ("wav2vec2", "no dropout"), ("vit", "cut twice")]


def _inputs(model):
    length = 1200 if model.main_input_name == "input_values" else 12
    inputs = example_inputs(model, batch_size=2, seed=3, length=length)
    return {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _cut(family, state):
    """Return a cut model of a family, in a state; the state is as it was."""
    model = tiny(family)
    model.can_resize = model.main_input_name == "input_ids"
    model = STATES[state](model)
    before = {(id(m), n) for m in model.modules() for n, v in vars(m).items() if v is True}
    structure = uneven(model, seed=2, drop_layer=state != "cut twice")
    hfslim.shrink(model, structure)
    now = {(id(m), n) for m in model.modules() for n, v in vars(m).items() if v is True}
    kept = {id(m) for m in model.modules()}
    assert {one for one in before if one[0] in kept} <= now
    return model


@torch.no_grad()
def _hidden(model):
    return model(**_inputs(model))[0]


def _base(model):
    base = getattr(model, model.base_model_prefix, None)
    return base if isinstance(base, nn.Module) else None


@torch.no_grad()
def _prove(family, state, folder, jobs):
    model = _cut(family, state)
    shard = {"max_shard_size": "20KB"} if state == "shards" else {}
    model.save_pretrained(folder / "whole", **shard)
    auto = auto_class(family)
    load = {**ATTENTION, "dtype": model.dtype}
    training, inputs = model.training, _inputs(model)
    expected = model.eval()(**inputs).logits
    model.train(training)
    same = auto.from_pretrained(folder / "whole", **load).eval()
    assert torch.equal(same(**inputs).logits, expected)
    config = AutoConfig.from_pretrained(folder / "whole")
    text = json.dumps(config.to_dict())
    assert "checkpointing" not in text.replace('"gradient_checkpointing"', "")
    assert '"p"' not in text
    built = auto.from_config(config, **load).eval()
    built.load_state_dict(model.state_dict())
    assert torch.equal(built(**inputs).logits, expected)
    built.save_pretrained(folder / "built")
    assert torch.equal(
        auto.from_pretrained(folder / "built", **load).eval()(**inputs).logits, expected
    )
    torch.save(inputs, folder / "whole" / "inputs.pt")
    jobs.append((str(folder / "whole"), auto.__name__, expected))
    base = _base(model)
    if base is None:
        return
    base.eval()
    hidden = base(**inputs)[0]
    base.save_pretrained(folder / "base", **shard)
    for name in ("whole", "base"):
        encoder = AutoModel.from_pretrained(folder / name, **load).eval()
        assert torch.equal(encoder(**inputs)[0], hidden), name
    again = auto.from_pretrained(folder / "base", **load).eval()
    assert torch.equal(_base(again)(**inputs)[0], hidden)
    torch.save(inputs, folder / "base" / "inputs.pt")
    jobs.append((str(folder / "base"), "AutoModel", hidden))


def _check(cases, root):
    """Prove cases here, then all folders in one process that cannot import hfslim."""
    jobs, failed = [], {}
    for family, state in cases:
        folder = root / f"{family}-{state}".replace(" ", "-")
        folder.mkdir()
        try:
            _prove(family, state, folder, jobs)
        except pytest.skip.Exception:
            continue
        except Exception as error:
            failed[family, state] = f"{type(error).__name__}: {error}"[:300]
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules")}
    listed = json.dumps([(folder, auto, True) for folder, auto, _ in jobs])
    (root / "jobs.json").write_text(listed)
    command = [sys.executable, str(SUPPORT / "without_hfslim.py"), f"@{root / 'jobs.json'}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, auto, expected in jobs:
        found = torch.load(f"{folder}/outputs.pt")
        if not all(torch.equal(found[name], expected) for name in ("first", "second")):
            failed[folder, auto] = f"{(found['first'] - expected).abs().max()}"
    assert not failed, "\n".join(f"{case}: {why}" for case, why in failed.items())
    return len(jobs)


def test_a_slice_of_states_and_families_loads_by_every_way(tmp_path):
    assert _check(SLICE, tmp_path) > len(SLICE)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("state", STATES)
def test_every_state_of_every_family_loads_by_every_way(state, tmp_path):
    assert _check([(family, state) for family in FAMILIES], tmp_path)
