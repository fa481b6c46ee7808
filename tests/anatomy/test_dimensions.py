"""Dimensions of the residual stream: norms over the open ones, costs, plain configs."""

import pytest
import sweep
import torch
import zoo
from models import auto_class, tiny
from torch.nn import functional as F
from transformers import TrainingArguments

import hfslim
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.structure import Structure
from hfslim.measuring.measurement import count_parameters, macs
from hfslim.pruning.gates.gated_norms import GatedNorm
from hfslim.pruning.scores.collect import collect
from hfslim.pruning.search import unit_costs as pricing
from hfslim.pruning.search.plain_config import check_plain

SHORT = {"input_ids": 10, "input_values": 1200}
STREAMS = {
    "bert": "bert.embeddings.word_embeddings",
    "electra": "electra.embeddings_project",
    "distilbert": "distilbert.embeddings.word_embeddings",
    "mpnet": "mpnet.embeddings.word_embeddings",
    "deberta-v2": "deberta.embeddings.word_embeddings",
    "modernbert": "model.embeddings.tok_embeddings",
    "vit": "vit.embeddings",
    "wav2vec2": "wav2vec2.feature_projection.projection",
    "whisper": "encoder.conv2",
    "llama": "model.embed_tokens",
}


def _tiny(family):
    return tiny(family, **({"num_conv_pos_embedding_groups": 4} if family == "wav2vec2" else {}))


def _inputs(model, batch=2):
    return example_inputs(model, batch, length=SHORT.get(model.main_input_name))


def _some(model, seed=0, kinds=("dimensions", "heads", "neurons", "layers")):
    """Keep about three quarters of everything, another set at each site."""
    draw = torch.Generator().manual_seed(seed)
    sites = {}
    for site in find_units(model, dimensions=True).of(kinds):
        number = max(site.size * 3 // 4, 1)
        kept = torch.randperm(site.size, generator=draw)[:number].tolist()
        sites.setdefault(site.kind, {})[site.path] = ({*kept, *site.fixed}, site.size)
    return Structure.of(sites)


def _together(model, heads, dimensions):
    """Keep some heads everywhere, and some dimensions of the stream and of what is as wide."""
    sites = {"heads": {}, "dimensions": {}}
    units = find_units(model, dimensions=True)
    stream = max((s for s in units if s.kind == "dimensions"), key=lambda s: len(s.feeds))
    for site in units:
        number = {"heads": heads, "dimensions": dimensions}.get(site.kind)
        if number and (site.kind == "heads" or site.size == stream.size):
            sites[site.kind][site.path] = (range(site.size - number, site.size), site.size)
    return Structure.of(sites)


@pytest.mark.parametrize("family", STREAMS)
@torch.no_grad()
def test_gated_equals_shrunk_equals_reloaded(family, tmp_path):
    model = _tiny(family)
    stream = find_units(model, dimensions=True).site("dimensions", STREAMS[family])
    assert len(stream.masked_norms) >= 6
    structure, inputs = _some(model), _inputs(model)
    whole = model(**inputs).logits
    with hfslim.gated(model, structure):
        expected = model(**inputs).logits
    assert (expected - whole).abs().max() > 1e-3
    torch.testing.assert_close(model(**inputs).logits, whole, rtol=0, atol=0)
    small = hfslim.shrink(model, structure)
    torch.testing.assert_close(small(**inputs).logits, expected, rtol=0, atol=1e-5)
    small.save_pretrained(tmp_path)
    again = auto_class(family).from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(again(**inputs).logits, expected, rtol=0, atol=1e-5)
    again_units = find_units(again, dimensions=True)
    narrow = max((s for s in again_units if s.kind == "dimensions"), key=lambda s: len(s.feeds))
    weights = [again.get_submodule(norm.module).weight for norm in narrow.masked_norms]
    assert {len(weight) for weight in weights} == {stream.size * 3 // 4 * stream.width}


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm, torch.nn.RMSNorm])
@torch.no_grad()
def test_a_norm_takes_its_statistics_over_the_open_dimensions(norm):
    torch.manual_seed(0)
    module, x = norm(6, eps=1e-2), torch.randn(3, 6) + 2
    for parameter in module.parameters():
        parameter.normal_()
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1])
    seen = mask.bool()
    if norm is torch.nn.LayerNorm:
        weight, bias = module.weight[seen], module.bias[seen]
        expected = F.layer_norm(x[:, seen], (4,), weight, bias, 1e-2)
    else:
        expected = F.rms_norm(x[:, seen], (4,), module.weight[seen], 1e-2)
    handles = GatedNorm(module).attach(lambda _: mask)
    torch.testing.assert_close(module(x)[:, seen], expected, rtol=0, atol=1e-6)
    for handle in handles:
        handle.remove()
    assert (module(x)[:, seen] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "wav2vec2", "whisper", "llama"])
@pytest.mark.parametrize("resource", ["macs", "parameters"])
def test_costs_are_exact_at_any_width(family, resource):
    model = _tiny(family)
    units, inputs = find_units(model, dimensions=True), _inputs(model, 1)
    units = units.of(("dimensions", "heads", "neurons", "layers"))
    structure = units.complete(_some(model, seed=1))
    told = pricing.count(model, units, resource, inputs).of(units, structure)
    small = hfslim.shrink(model, structure, inputs)
    assert told == (macs(small, inputs) if resource == "macs" else count_parameters(small))


def test_scores_are_the_fisher_information_of_a_gate_on_all_that_reads_the_stream():
    model = tiny("bert")
    units = find_units(model, dimensions=True).of(["dimensions"])
    site = units.site("dimensions", STREAMS["bert"])
    batch = {**_inputs(model, 3), "labels": torch.tensor([0, 2, 1])}
    scores = collect(model, units, [batch], {"dimensions": "fisher"}, progress=False)
    expected = torch.zeros(site.size)
    for row in range(3):
        gate = torch.ones(site.size, requires_grad=True)
        handles = [
            model.get_submodule(feed.module).register_forward_pre_hook(
                lambda _, args, gate=gate: (args[0] * gate, *args[1:])
            )
            for feed in site.feeds
        ]
        model(**{name: value[row : row + 1] for name, value in batch.items()}).loss.backward()
        expected += gate.grad.square() / 3
        for handle in handles:
            handle.remove()
    found = scores["dimensions", site.path].float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "heads", "dimensions", "fields"),
    [
        ("bert", 3, 24, {"hidden_size": 24, "num_attention_heads": 3}),
        ("distilbert", 3, 24, {"dim": 24, "n_heads": 3}),
        ("electra", 3, 24, {"hidden_size": 24, "num_attention_heads": 3}),
        ("vit", 4, 28, {"hidden_size": 28, "num_attention_heads": 4, "head_dim": 8}),
        ("whisper", 3, 6, {"d_model": 24, "encoder_attention_heads": 3}),
        ("wav2vec2", 3, 3, {"hidden_size": 24, "num_conv_pos_embedding_groups": 3}),
        ("qwen3", 2, 28, {"hidden_size": 28, "head_dim": 16}),
    ],
)
@torch.no_grad()
def test_the_stock_config_tells_the_width(family, heads, dimensions, fields, tmp_path):
    model = _tiny(family)
    small = hfslim.shrink(model, _together(model, heads, dimensions))
    config = small.config.to_dict()
    assert "hfslim" not in config
    assert {name: config[name] for name in fields} == fields
    inputs = _inputs(small)
    small.save_pretrained(tmp_path)
    again = auto_class(family).from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(again(**inputs).logits, small(**inputs).logits, rtol=0, atol=1e-5)


def test_uniform_pruning_keeps_as_many_dimensions_as_its_heads_have():
    model = tiny("bert")
    data = [{**_inputs(model, 4), "labels": torch.tensor([0, 1, 2, 0])}]
    kinds = ("heads", "neurons", "dimensions")
    before = macs(model, _inputs(model, 1))
    result = hfslim.prune(
        model, data, {"macs": 0.5}, kinds, inputs=_inputs(model, 1), progress=False, uniform=True
    )
    config = result.model.config
    assert not hasattr(config, "hfslim")
    assert config.hidden_size == 8 * config.num_attention_heads < 32
    assert macs(model, _inputs(model, 1)) <= 0.5 * before


def test_a_search_over_all_kinds_meets_its_budget():
    model = tiny("modernbert")
    data = [{**_inputs(model, 4), "labels": torch.tensor([0, 1, 2, 0])}]
    kinds = ("neurons", "dimensions")
    before = macs(model, _inputs(model, 1))
    result = hfslim.prune(
        model, data, {"macs": 0.4}, kinds, inputs=_inputs(model, 1), progress=False
    )
    assert 0.38 * before < macs(model, _inputs(model, 1)) <= 0.4 * before
    assert result.structure.counts()["dimensions"][0] < result.structure.counts()["dimensions"][1]


def test_dimensions_go_while_a_model_trains(tmp_path):
    model = tiny("bert")
    inputs = _inputs(model, 1)
    before = macs(model, inputs)
    callback = hfslim.PruningCallback({"macs": 0.6}, units=("dimensions",), inputs=inputs)
    rows = [{**{n: v[0] for n, v in inputs.items()}, "labels": label} for label in (0, 1, 2, 0)]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    hfslim.SlimTrainer(model=model, args=args, train_dataset=rows, callbacks=[callback]).train()
    assert 0.55 * before < macs(model, inputs) <= 0.6 * before
    assert callback.structure.counts()["dimensions"][0] < 64


def test_what_cannot_be_narrower_is_refused_with_the_reason():
    swin = find_units(tiny("swin"), dimensions=True)
    with pytest.raises(ValueError, match="a norm runs across several runs of them"):
        swin.of(["dimensions"])
    bert = tiny("bert")
    with pytest.raises(ValueError, match=r"fewer \['dimensions'\]; .*\['heads', 'dimensions'\]"):
        check_plain(bert, find_units(bert, dimensions=True).of(["dimensions"]))
    assert check_plain(tiny("vit"), find_units(tiny("vit"), True).of(["dimensions"])).tied is False


def test_dimensions_are_looked_for_only_where_they_are_asked_for():
    assert not any(site.kind == "dimensions" for site in find_units(tiny("bert")))


@pytest.mark.parametrize("case", ["text/xlm-roberta", "text/markuplm", "audio/wav2vec2-bert"])
def test_a_module_may_lie_between_two_runs_or_join_several(case, tmp_path):
    """A head that reads the stream and is as wide; embeddings side by side; a gated linear unit."""
    difference, _ = sweep.prove(case, "eager", ("dimensions",), tmp_path)
    assert difference < 1e-6


def test_a_forward_that_holds_its_width_is_refused_and_the_model_put_back():
    model = zoo.tiny("image/segformer")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    structure = _some(model, kinds=("dimensions",))
    with pytest.raises(RuntimeError, match=r"the cut model does not run \(.*nothing was changed"):
        hfslim.shrink(model, structure)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
