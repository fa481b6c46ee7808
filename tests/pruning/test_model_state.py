"""What is no classifier, or has no plain weights of its own, is refused before any work."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from distilling import config, examples
from models import tiny
from structures import Unchanged
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from transformers import (
    AutoConfig,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForTokenClassification,
    Trainer,
    TrainingArguments,
)

import hfslim
from hfslim import DistillationTrainer, PruningCallback, WeightPruningCallback
from hfslim.anatomy.inputs import example_inputs
from hfslim.distillation.teacher.teacher import load_teacher
from hfslim.pipeline.opening import open_classifier
from hfslim.pruning import CRITERIA, prune_family, prune_within
from hfslim.tasks import TASKS
from hfslim.tasks.labels import Labels
from hfslim.tasks.models import load_model

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
SPEECH = {**tiny("wav2vec2").config.to_dict(), "tdnn_dim": (16, 16), "tdnn_kernel": (5, 3)}
SPEECH |= {"tdnn_dilation": (1, 1), "xvector_output_dim": 16, "num_labels": 3}
SEGFORMER = {key: [1, 1, 1, 1] for key in ("hidden_sizes", "num_attention_heads", "depths")}
CLIP = {"text_config": TEXT, "vision_config": {**TEXT, "image_size": 16, "patch_size": 4}}
HEADS = {
    "TokenClassification": ("bert", TEXT),
    "MaskedLM": ("bert", TEXT),
    "CausalLM": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}),
    "NextSentencePrediction": ("bert", TEXT),
    "QuestionAnswering": ("bert", TEXT),
    "MultipleChoice": ("bert", TEXT),
    "PreTraining": ("bert", TEXT),
    "SemanticSegmentation": ("segformer", SEGFORMER),
    "MaskedImageModeling": ("vit", {**tiny("vit").config.to_dict()}),
    "CTC": ("wav2vec2", SPEECH),
    "AudioFrameClassification": ("wav2vec2", SPEECH),
    "AudioXVector": ("wav2vec2", SPEECH),
    "ZeroShotImageClassification": ("clip", CLIP),
    "Seq2SeqLM": (
        "bart",
        {"d_model": 32, "vocab_size": 64, "encoder_layers": 1, "decoder_layers": 1},
    ),
}


def headed(head: str):
    family, fields = HEADS[head]
    fields = {k: v for k, v in fields.items() if k not in ("model_type", "architectures")}
    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModelFor{head}")
    return auto.from_config(AutoConfig.for_model(family, **fields)).eval()


class Untouched(list):
    """Data whose first reading fails the test."""

    def __iter__(self):
        raise AssertionError("data was read before the refusal")


def trained(model, folder: Path, callback):
    args = TrainingArguments(folder, max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    Trainer(model, args, train_dataset=examples(tiny("bert")), callbacks=[callback]).train()


def entries(model, folder: Path, sparsity: bool = True):
    data = Untouched()
    yield lambda: hfslim.prune(model, data, {"macs": 0.5})
    yield lambda: prune_family(model, data, [0.5])
    yield lambda: prune_within(model, data, 0.1, lambda _: 1.0)
    yield lambda: hfslim.sparsify(model, data, 0.5)
    yield lambda: hfslim.sparsify(model, data, 0.5, method="wanda")
    yield lambda: trained(model, folder, PruningCallback({"macs": 0.5}))
    if sparsity:
        yield lambda: hfslim.sparsify(model, sparsity=0.5, method="magnitude")
        yield lambda: hfslim.weight_sparsity(model)
        yield lambda: trained(model, folder, WeightPruningCallback(0.5))
        yield lambda: hfslim.shrink(model, hfslim.find_units(tiny("bert")).full())


@pytest.mark.parametrize("head", HEADS)
def test_other_heads_are_refused_by_every_entry(head: str, tmp_path: Path) -> None:
    model = headed(head)
    for enter in entries(model, tmp_path, sparsity=False):
        with pytest.raises(
            ValueError, match=r"not a classifier, whose logits are \[batch, classes"
        ):
            enter()
    with pytest.raises(ValueError, match="not a classifier"):
        DistillationTrainer(model, config(tmp_path), teacher=tiny("bert"))


def test_a_folder_of_another_head_is_refused_though_all_its_weights_would_load(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    fields = tiny("modernbert").config.to_dict()
    model = ModernBertForTokenClassification(ModernBertConfig(**fields))
    model.save_pretrained(tmp_path)
    labels = Labels("single_label_classification", tuple(model.config.id2label.values()))
    for load in (
        lambda: open_classifier(str(tmp_path)),
        lambda: load_model(TASKS["text-classification"], str(tmp_path), labels, new_head=False),
        lambda: load_teacher(str(tmp_path), tiny("modernbert")),
    ):
        with pytest.raises(ValueError, match="for token classification, not a classifier"):
            load()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_refuses_a_head_of_ones_own(criterion: str) -> None:
    class PerToken(BertForSequenceClassification):
        def forward(self, **inputs):
            return {"logits": self.classifier(self.bert(**inputs).last_hidden_state)}

    model = PerToken(AutoConfig.for_model("bert", **TEXT)).eval()
    units = [kind for kind in ("heads", "layers") if kind in CRITERIA[criterion].kinds][:1]
    match = r"logits \[2, 16, 3\], a classifier's are \[batch, classes\]"
    with pytest.raises(ValueError, match=match):
        hfslim.prune(model, Untouched(), {"macs": 0.5}, units=units, criterion=criterion)


def test_the_zeros_of_any_head_are_counted_and_set_by_magnitude() -> None:
    model = headed("TokenClassification")
    assert hfslim.sparsify(model, sparsity=0.5, method="magnitude").sparsity[-1].sparsity == 0.5


def masked(model):
    for layer in model.bert.encoder.layer:
        prune.l1_unstructured(layer.output.dense, "weight", 0.4)


def bias_masked(model):
    prune.random_unstructured(model.bert.encoder.layer[0].output.dense, "bias", 0.4)


def weight_normed(model):
    parametrizations.weight_norm(model.bert.encoder.layer[0].output.dense)


def old_spectral(model):
    spectral_norm(model.bert.encoder.layer[0].output.dense)


def orthogonal(model):
    parametrizations.orthogonal(model.bert.encoder.layer[0].attention.self.query)


def quantized(model):
    model.bert.encoder.layer[0].output.dense = torch.ao.nn.quantized.dynamic.Linear(48, 32)


def in_integers(model):
    linear = model.bert.encoder.layer[0].output.dense
    linear.weight = nn.Parameter(linear.weight.detach().char(), requires_grad=False)


class Packed(torch.Tensor):
    """A form of a tensor of a quantization library."""


def packed(model):
    linear = model.bert.encoder.layer[0].output.dense
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Packed))


def compiled(model):
    model.compile()


def partly_compiled(model):
    model.bert.encoder = torch.compile(model.bert.encoder)


STATES = {
    masked: r"'bert.+dense.weight' by torch\.nn\.utils\.prune: .* by torch\.nn\.utils\.prune\.rem",
    bias_masked: r"dense\.bias' by .* torch\.nn\.utils\.prune\.remove\(module, 'bias'\)",
    weight_normed: r"by _WeightNorm: .*\.parametrize\.remove_parametrizations\(module, 'weight'\)",
    old_spectral: r"by SpectralNorm: .* by torch\.nn\.utils\.remove_spectral_norm",
    orthogonal: r"query\.weight' by _Orthogonal: .*\.remove_parametrizations",
    quantized: r"quantized or packed weights, such as .* \(Linear\): load .*dequant",
    in_integers: r"such as 'bert.+dense.weight' \(torch\.int8\)",
    packed: r"such as 'bert.+dense.weight' \(Packed\)",
    compiled: "it is compiled",
    partly_compiled: r"its 'bert\.encoder' is compiled.*`_orig_mod`",
}


@pytest.mark.parametrize("change", STATES, ids=lambda change: change.__name__)
def test_weights_that_are_not_plain_are_refused_by_every_entry(change, tmp_path: Path) -> None:
    model = tiny("bert")
    change(model)
    for enter in entries(model, tmp_path):
        with pytest.raises(ValueError, match=STATES[change]):
            enter()


def test_what_is_made_plain_is_counted_and_cut() -> None:
    model = tiny("bert")
    masked(model)
    for layer in model.bert.encoder.layer:
        prune.remove(layer.output.dense, "weight")
    rows = hfslim.weight_sparsity(model, ["output.dense"], ["attention.output.dense"])
    assert rows[-1].sparsity == pytest.approx(0.4, abs=1e-3)
    hfslim.prune(model, [example_inputs(model, 4, length=8)], {"macs": 0.6}, progress=False)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrappers_are_refused_by_every_entry(wrap, tmp_path: Path) -> None:
    model = wrap(tiny("bert"))
    for enter in [*entries(model, tmp_path)][:5]:
        with pytest.raises(
            TypeError, match=r"is a wrapper: pass the model inside, its '(_orig_)?mod"
        ):
            enter()
    with pytest.raises(TypeError, match="is a wrapper"):
        hfslim.weight_sparsity(model)


@pytest.mark.parametrize("family", ["wav2vec2", "hubert", "wavlm"])
def test_weight_norm_that_the_family_has_itself_is_no_obstacle(family: str) -> None:
    model = tiny(family)
    data = [example_inputs(model, 4, length=1600)]
    hfslim.prune(model, data, {"macs": 0.6}, progress=False)
    hfslim.sparsify(model, sparsity=0.5, method="magnitude")
    parametrizations.weight_norm(model.classifier)
    with pytest.raises(ValueError, match=r"1 tensors .* 'classifier\.weight' by _WeightNorm"):
        hfslim.weight_sparsity(model)


def test_a_replaced_head_is_refused_before_any_work_and_a_subclass_is_not(tmp_path: Path) -> None:
    class Headed(BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.classifier = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3))

    own = Headed(AutoConfig.for_model("bert", **TEXT)).eval()
    replaced = tiny("bert")
    replaced.classifier = copy.deepcopy(own.classifier)
    with Unchanged(replaced):
        for enter in [*entries(replaced, tmp_path)][:3]:
            with pytest.raises(ValueError, match=r"'classifier\.0"):
                enter()
    with pytest.raises(ValueError, match=r"'classifier\.0"):
        trained(replaced, tmp_path, PruningCallback({"macs": 0.5}))
    data = [example_inputs(own, 4, length=8)]
    hfslim.prune(own, data, {"macs": 0.6}, progress=False)
    own.save_pretrained(tmp_path / "cut")
    with torch.no_grad():
        left = own(**data[0]).logits - Headed.from_pretrained(tmp_path / "cut")(**data[0]).logits
    assert left.abs().max() == 0
