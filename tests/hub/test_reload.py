import copy
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from datasets import Dataset
from models import auto_class, tiny
from places import SUPPORT
from structures import Unchanged, uneven
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoQuantizationConfig

import hfslim
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.structure import Structure

load = AutoModelForSequenceClassification.from_pretrained
SCRIPT = SUPPORT / "without_hfslim.py"


def _inputs(model):
    length = 1200 if model.main_input_name == "input_values" else 12
    return example_inputs(model, batch_size=2, seed=3, length=length)


def _keep(model, **numbers):
    """Keep the first units of every site of some kinds."""
    sites = {kind: {} for kind in numbers}
    for site in find_units(model).of(numbers):
        sites[site.kind][site.path] = (range(numbers[site.kind]), site.size)
    return Structure.of(sites)


def _layers(model, *kept):
    (site,) = find_units(model).of(["layers"])
    return Structure.of({"layers": {site.path: (kept, site.size)}})


PLAIN = {
    "bert-layers": ("bert", lambda model: _layers(model, 0, 2)),
    "bert-neurons": ("bert", lambda model: _keep(model, neurons=20)),
    "modernbert-layers": ("modernbert", lambda model: _layers(model, 0, 2)),
    "distilbert-layers": ("distilbert", lambda model: _layers(model, 1)),
    "vit-both": ("vit", lambda model: _keep(model, heads=2, neurons=20)),
    "qwen2-groups": ("qwen2", lambda model: _keep(model, heads=1)),
    "whisper-layers": ("whisper", lambda model: _layers(model, 0, 1)),
}
UNEVEN = ("bert", "wavlm", "mpnet", "beit", "swin", "llama", "modernbert")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Outputs here, and in a process that cannot import hfslim, of all folders in one launch."""
    root = tmp_path_factory.mktemp("elsewhere")
    cases = {name: (*case, False) for name, case in PLAIN.items()}
    cases |= {name: (name, uneven, True) for name in UNEVEN}
    jobs, expected = [], {}
    for name, (family, structure, trust) in cases.items():
        model, folder = tiny(family), root / name
        hfslim.shrink(model, structure(model))
        model.save_pretrained(folder)
        torch.save(_inputs(model), folder / "inputs.pt")
        with torch.no_grad():
            expected[name] = model(**_inputs(model)).logits
        jobs.append([str(folder), auto_class(family).__name__, trust])
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules")}
    command = [sys.executable, str(SCRIPT), json.dumps(jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "quantization" not in done.stderr
    return root, expected


@pytest.mark.parametrize("name", PLAIN)
def test_a_structure_that_the_config_can_say_needs_nothing_of_hfslim(elsewhere, name):
    root, expected = elsewhere
    config = json.loads((root / name / "config.json").read_text())
    assert not {"hfslim", "quantization_config", "auto_map"} & config.keys()
    assert not (root / name / "modeling_hfslim.py").exists()
    outputs = torch.load(root / name / "outputs.pt")
    torch.testing.assert_close(outputs["first"], expected[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["second"], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", UNEVEN)
def test_any_structure_loads_runs_and_saves_where_hfslim_is_not_installed(elsewhere, name):
    root, expected = elsewhere
    outputs = torch.load(root / name / "outputs.pt")
    torch.testing.assert_close(outputs["first"], expected[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["second"], expected[name], rtol=1e-5, atol=1e-5)
    assert (root / name / "again" / "modeling_hfslim.py").exists()


@pytest.mark.parametrize("name", ["bert", "wavlm"])
@torch.no_grad()
def test_what_was_saved_elsewhere_loads_here(elsewhere, name):
    root, expected = elsewhere
    model = auto_class(name).from_pretrained(root / name / "again").eval()
    torch.testing.assert_close(model(**_inputs(model)).logits, expected[name], rtol=1e-5, atol=1e-5)


@pytest.fixture
def pruned(tmp_path):
    """A pruned model, and the folder that it was saved to."""
    model = tiny("bert")
    hfslim.shrink(model, uneven(model))
    model.save_pretrained(tmp_path / "pruned")
    return model, tmp_path / "pruned"


def test_loads_as_the_stock_class_not_marked_as_quantized(pruned):
    model, folder = pruned
    again = load(folder)
    assert type(again) is BertForSequenceClassification
    assert not getattr(again, "is_quantized", False)
    assert getattr(again, "hf_quantizer", None) is None
    expected, found = model.state_dict(), again.state_dict()
    assert list(expected) == list(found)
    assert all(torch.equal(expected[name], value) for name, value in found.items())


def test_saving_again_writes_the_same_folder(pruned, tmp_path):
    _, folder = pruned
    load(folder).save_pretrained(tmp_path / "again")
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "again").iterdir()}
    one, two = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert one == two
    assert one["hfslim"]["version"] == 1


def test_the_stock_trainer_trains_and_saves_it(pruned, tmp_path):
    _, folder = pruned
    model = load(folder)
    before = model.bert.encoder.layer[1].output.dense.bias.clone()
    rows = _inputs(model)["input_ids"].tolist()
    arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True, max_steps=1, report_to=[])
    data = Dataset.from_dict({"input_ids": rows, "labels": [0, 1]})
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    again = load(tmp_path / "trained")
    assert not torch.equal(again.bert.encoder.layer[1].output.dense.bias, before)
    assert (tmp_path / "trained" / "modeling_hfslim.py").exists()


@torch.no_grad()
def test_pipeline_runs_it(pruned):
    model, folder = pruned
    words = {"[UNK]": 0, "good": 5, "bad": 6}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    (found,) = pipeline("text-classification", model=str(folder))("good bad good")
    chances = model(input_ids=torch.tensor([[5, 6, 5]])).logits.softmax(-1)[0]
    assert found["score"] == pytest.approx(chances.max().item(), rel=1e-5)
    assert found["label"] == model.config.id2label[chances.argmax().item()]


@torch.no_grad()
def test_shards_load(pruned, tmp_path):
    model, _ = pruned
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again = load(tmp_path / "shards").eval()
    expected = model(**_inputs(model)).logits
    torch.testing.assert_close(again(**_inputs(model)).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_loads_in_half_precision(pruned):
    model, folder = pruned
    again = load(folder, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    expected = model.to(torch.bfloat16)(**_inputs(model)).logits
    assert torch.equal(again(**_inputs(model)).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_copies_run_and_save(clone, family, tmp_path):
    model = tiny(family)
    hfslim.shrink(model, uneven(model))
    same = clone(model)
    expected = model(**_inputs(model)).logits
    del model
    assert torch.equal(same(**_inputs(same)).logits, expected)
    same.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_hfslim.py").exists()
    again = load(tmp_path).eval()
    torch.testing.assert_close(again(**_inputs(again)).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_second_cut_that_the_config_can_say_drops_the_blueprint(tmp_path):
    model = tiny("bert")
    widths = iter((30, 20, 30))
    sites = {s.path: (range(next(widths)), s.size) for s in find_units(model).of(["neurons"])}
    hfslim.shrink(model, Structure.of({"neurons": sites}))
    assert model.config.hfslim["shapes"]
    hfslim.shrink(model, _layers(model, 0, 2))
    assert not hasattr(model.config, "hfslim")
    model.save_pretrained(tmp_path)
    assert model.config.intermediate_size == 30
    assert not (tmp_path / "modeling_hfslim.py").exists()
    assert load(tmp_path).config.num_hidden_layers == 2


def test_a_whole_model_loads_as_ever(tmp_path):
    model = tiny("bert")
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert "save_pretrained" not in vars(again)
    assert not hasattr(again.config, "quantization_config")
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_other_quantization_methods_are_untouched():
    config = AutoQuantizationConfig.from_dict(
        {"quant_method": "bitsandbytes", "load_in_8bit": True}
    )
    assert type(config) is BitsAndBytesConfig
    ours = [n for n, c in AUTO_QUANTIZER_MAPPING.items() if c.__module__.startswith("hfslim")]
    assert ours == ["hfslim"]


def test_a_pruned_model_saves_with_positional_arguments_like_any_other(tmp_path):
    model = tiny("bert")
    hfslim.shrink(model, uneven(model))
    model.save_pretrained(tmp_path / "other_rank", False)
    assert not (tmp_path / "other_rank" / "modeling_hfslim.py").exists()
    doubled = {name: 2 * value for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", True, dict(doubled))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "given")
    assert all(torch.equal(doubled[name], value) for name, value in again.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("trust", [False, True])
def test_the_encoder_loads_from_a_subfolder_too(trust, tmp_path):
    model = tiny("bert")
    hfslim.shrink(model, uneven(model))
    expected = model.bert(**_inputs(model)).last_hidden_state
    model.save_pretrained(tmp_path / "whole")
    model.bert.save_pretrained(tmp_path / "base")
    # transformers reads code from the top of a repository only.
    shutil.copy(tmp_path / "base" / "modeling_hfslim.py", tmp_path)
    for name in ("whole", "base"):
        same = {"subfolder": name, "trust_remote_code": trust, "attn_implementation": "eager"}
        encoder = AutoModel.from_pretrained(tmp_path, **same).eval()
        assert torch.equal(encoder(**_inputs(model)).last_hidden_state, expected)
    assert "bert.encoder.layer.0.attention.self" in model.config.hfslim["attributes"]


def test_a_head_of_other_outputs_than_the_config_is_refused_before_work():
    model = tiny("bert")
    model.classifier = torch.nn.Linear(32, 5)
    with Unchanged(model), pytest.raises(ValueError, match=r"config\.num_labels is 3: set it to 5"):
        hfslim.shrink(model, uneven(model))


def test_settings_of_the_live_model_are_no_part_of_the_blueprint(tmp_path):
    model = tiny("bert")
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    hfslim.shrink(model, _keep(model, neurons=20))
    assert not hasattr(model.config, "hfslim")
    assert model.is_gradient_checkpointing
    model.save_pretrained(tmp_path)
    assert "gradient_checkpointing" not in (tmp_path / "config.json").read_text()
    assert load(tmp_path).bert.embeddings.dropout.p == 0.1


@torch.no_grad()
def test_a_model_that_shares_its_config_with_a_cut_one_saves_as_before(tmp_path):
    model = tiny("bert")
    other = BertForSequenceClassification(model.config).eval()
    hfslim.shrink(model, uneven(model))
    assert not hasattr(other.config, "hfslim")
    other.save_pretrained(tmp_path)
    same = load(tmp_path, attn_implementation=other.config._attn_implementation).eval()
    assert torch.equal(same(**_inputs(other)).logits, other(**_inputs(other)).logits)


def test_a_whole_model_of_a_cut_ones_config_saves_without_marks(pruned, tmp_path):
    _, folder = pruned
    whole = BertForSequenceClassification(load(folder).config)
    whole.save_pretrained(tmp_path / "again")
    assert {p.name for p in (tmp_path / "again").iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert not {"hfslim", "quantization_config", "auto_map"} & config.keys()
    assert load(tmp_path / "again").num_parameters() == whole.num_parameters()


@torch.no_grad()
def test_a_shallow_copy_with_another_head_saves_its_own(pruned, tmp_path):
    _, folder = pruned
    model = load(folder)
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin.classifier = torch.nn.Linear(32, 3)
    twin.save_pretrained(tmp_path / "twin")
    assert torch.equal(load(tmp_path / "twin").classifier.weight, twin.classifier.weight)


def test_a_pruned_model_that_is_deleted_leaves_memory_at_once(pruned):
    _, folder = pruned
    model = tiny("bert")
    hfslim.shrink(model, uneven(model))
    loaded = load(folder)
    alive = [weakref.ref(model), weakref.ref(loaded)]
    gc.collect()
    gc.disable()
    try:
        del model, loaded
        assert [one() for one in alive] == [None, None]
    finally:
        gc.enable()
