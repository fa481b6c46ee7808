import copy
from dataclasses import replace

import pytest
import torch
from models import tiny
from structures import uneven

import hfslim
from hfslim.anatomy import Cut, Units, example_inputs, find_units
from hfslim.measure import count_parameters, macs
from hfslim.prune import UnreachableTargetError, surgery
from hfslim.structure import Structure

ATTENTION = "bert.encoder.layer.1.attention.self"
_PLAIN = (int, float, str, tuple)


def _data(model, batches=2, labels=True):
    for seed in range(batches):
        batch = example_inputs(model, 4, seed, length=8)
        yield batch | ({"labels": torch.arange(4) % 3} if labels else {})


def _prune(model, data=None, **options):
    settings = {"target": {"macs": 0.6}, "progress": False} | options
    return hfslim.prune(model, list(_data(model)) if data is None else data, **settings)


class _Unchanged:
    """Checks that a block leaves weights, config, classes and sizes bit for bit."""

    def __init__(self, model):
        self.model = model

    def _state(self):
        settings = [
            (type(m), {k: v for k, v in vars(m).items() if k[0] != "_" and isinstance(v, _PLAIN)})
            for m in self.model.modules()
        ]
        return copy.deepcopy((self.model.config.to_dict(), settings, self.model.training))

    def __enter__(self):
        self.state = self._state()
        self.parameters = list(self.model.named_parameters())
        self.values = {k: v.clone() for k, v in self.model.state_dict().items()}

    def __exit__(self, kind, *_):
        assert self._state() == self.state
        now = list(self.model.named_parameters())
        assert [name for name, _ in now] == [name for name, _ in self.parameters]
        assert all(a is b for (_, a), (_, b) in zip(now, self.parameters, strict=True))
        after = self.model.state_dict()
        assert list(after) == list(self.values)
        assert all(torch.equal(after[k], v) for k, v in self.values.items())


@pytest.mark.parametrize(
    "target",
    [
        {"macs": 0},
        {"macs": 1.01},
        {"macs": -0.5},
        {"macs": float("nan")},
        {"macs": "half"},
        {"macs": True},
        {"latency": 0.5},
        {"macs": 0.5, "parameters": 0.5},
        {},
        0.5,
        {"sparsity": 1.0},
        {"sparsity": {"heads": -0.1}},
        {"sparsity": {"layers": 0.5}},
        {"sparsity": {"tails": 0.5}},
    ],
    ids=str,
)
def test_a_target_out_of_range_is_refused(target):
    model = tiny("bert")
    with _Unchanged(model), pytest.raises(ValueError, match="target"):
        _prune(model, target=target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": ("head",)}, "unknown kind of unit 'head'"),
        ({"units": ()}, "no kind of unit given"),
        ({"criterion": "hessian"}, "criterion for heads: got 'hessian'"),
        ({"data": []}, "calibration data is empty"),
        ({"max_examples": 0}, "calibration data is empty"),
        ({"data": [{"input_ids": [[1, 2]]}]}, r"holds no tensors, only \['input_ids'\]"),
    ],
)
def test_an_argument_that_cannot_work_is_refused(options, message):
    model = tiny("bert")
    with _Unchanged(model), pytest.raises(ValueError, match=message):
        _prune(model, **options)


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "activation", "magnitude"])
def test_weights_that_are_not_finite_are_refused(criterion):
    model = tiny("bert")
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        _prune(model, criterion=criterion)
    assert find_units(model).full().counts()["heads"] == (12, 12)


def test_a_target_below_the_least_reachable_is_refused_before_any_scoring():
    model = tiny("bert")

    def data():
        raise AssertionError("the data was touched")
        yield

    with _Unchanged(model), pytest.raises(UnreachableTargetError, match="cannot be reached"):
        _prune(model, data(), target={"macs": 0.001})


@pytest.mark.parametrize("resource", ["macs", "parameters"])
@pytest.mark.parametrize("units", [("heads", "neurons"), ("heads", "neurons", "layers")])
def test_the_target_is_met_and_not_by_much(resource, units):
    model = tiny("bert")
    inputs = example_inputs(model, length=16)

    def cost():
        return macs(model, inputs) if resource == "macs" else count_parameters(model)

    whole = cost()
    result = _prune(model, target={resource: 0.6}, units=units, inputs=inputs)
    assert result.model is model
    assert 0.57 < cost() / whole <= 0.6
    assert not result.structure.is_full


def test_macs_are_counted_at_the_stated_shapes():
    model, same = tiny("bert"), tiny("bert")
    shapes = {"input_ids": [1, 16], "attention_mask": [1, 16]}
    tensors = example_inputs(same, length=16)
    by_shape, by_tensor = _prune(model, inputs=shapes), _prune(same, inputs=tensors)
    assert by_shape.structure == by_tensor.structure


def test_sparsity_counts_units():
    result = _prune(tiny("bert"), target={"sparsity": {"heads": 0.5, "neurons": 0.25}})
    assert result.structure.counts() == {"heads": (6, 12), "neurons": (108, 144)}


def test_a_target_of_one_changes_nothing():
    model = tiny("bert")
    with _Unchanged(model):
        assert _prune(model, target={"macs": 1.0}).structure.is_full


def test_the_same_seed_prunes_the_same():
    one, same, other = (
        _prune(m, criterion="random", seed=s).structure
        for m, s in ((tiny("bert"), 0), (tiny("bert"), 0), (tiny("bert"), 1))
    )
    assert one == same != other


@pytest.mark.parametrize(
    ("overrides", "labels"),
    [
        ({"num_labels": 3}, torch.tensor([0, 1, 2, 0])),
        ({"num_labels": 3}, None),
        ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0, 0.0])),
        ({"num_labels": 1}, None),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]]),
        ),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, None),
    ],
)
def test_every_kind_of_label_prunes(overrides, labels):
    model = tiny("bert", **overrides)
    batch = example_inputs(model, 4, length=8)
    data = [batch if labels is None else batch | {"labels": labels}]
    result = _prune(model, data)
    assert not result.structure.is_full
    assert all((value >= 0).all() and value.sum() > 0 for value in result.scores.values())


def test_fisher_keeps_what_the_task_needs():
    """Neurons that reach no output score nothing, and go first."""
    model = tiny("bert")
    useless = slice(0, 24)
    for layer in model.bert.encoder.layer:
        layer.output.dense.weight.data[:, useless] = 0
    with torch.no_grad():
        batch = next(_data(model))
        expected = model(**batch).logits
        result = _prune(model, target={"sparsity": {"neurons": 0.5}}, units=("neurons",))
        torch.testing.assert_close(model(**batch).logits, expected)
    assert {e.kept for e in result.structure} == {tuple(range(24, 48))}


def test_pruning_twice_cuts_deeper():
    model = tiny("bert")
    inputs = example_inputs(model, length=16)
    whole = macs(model, inputs)
    _prune(model, inputs=inputs)
    _prune(model, inputs=inputs)
    assert 0.33 < macs(model, inputs) / whole <= 0.36


def test_a_layer_goes_by_its_own_criterion():
    model = tiny("bert")
    second = model.bert.encoder.layer[1]
    for part in (second.attention.output.dense, second.output.dense):
        torch.nn.init.zeros_(part.weight)
        torch.nn.init.zeros_(part.bias)
    for norm in (second.attention.output.LayerNorm, second.output.LayerNorm):
        norm.reset_parameters()
    result = _prune(
        model,
        target={"sparsity": {"layers": 0.34}},
        units=("layers",),
        criterion={"layers": "block_influence"},
    )
    assert result.structure.kept("layers", "bert.encoder.layer") == (0, 2)


class TestShrink:
    @pytest.mark.parametrize("tensor", ["query", "key", "output"])
    def test_a_cut_that_goes_wrong_is_taken_back(self, monkeypatch, tensor):
        model = tiny("bert")
        units = find_units(model)
        site = units.site("heads", ATTENTION)

        class Shifted(Cut):
            def indices(self, kept, total):
                return super().indices(kept, total).roll(1)

        cuts = tuple(
            Shifted(**vars(cut)) if tensor in cut.module and cut.tensor == "weight" else cut
            for cut in site.cuts
        )
        wrong = Units(tuple(replace(s, cuts=cuts) if s == site else s for s in units))
        monkeypatch.setattr(surgery, "find_units", lambda _: wrong)
        kept = {"heads": {ATTENTION: ([0, 2], 4)}, "layers": {"bert.encoder.layer": ([1, 2], 3)}}
        with _Unchanged(model), pytest.raises(RuntimeError, match="differs from the gated one"):
            hfslim.shrink(model, Structure.of(kept))

    @pytest.mark.parametrize("family", ["wavlm", "mpnet", "swin", "qwen2"])
    def test_a_description_that_fails_takes_everything_back(self, monkeypatch, family):
        model = tiny(family)

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr(surgery.blueprint, "describe", fail)
        with _Unchanged(model), pytest.raises(OSError, match="disk full"):
            hfslim.shrink(model, uneven(model))

    def test_a_second_cut_that_fails_leaves_the_first(self, monkeypatch):
        model = tiny("wavlm")
        hfslim.shrink(model, uneven(model))

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr(surgery.blueprint, "describe", fail)
        with _Unchanged(model), pytest.raises(OSError, match="disk full"):
            hfslim.shrink(model, uneven(model, seed=1, drop_layer=False))

    def test_outputs_that_are_not_finite_cannot_be_checked(self):
        model = tiny("bert")
        model.classifier.bias.data[0] = float("nan")
        structure = uneven(model)
        with pytest.raises(RuntimeError, match="not finite"):
            hfslim.shrink(model, structure)

    def test_a_structure_of_another_model_is_refused(self):
        model = tiny("bert")
        with _Unchanged(model), pytest.raises(KeyError, match="has no"):
            hfslim.shrink(model, uneven(tiny("vit")))

    def test_mode_and_trainability_are_kept(self):
        model = tiny("bert").train()
        model.bert.encoder.layer[0].requires_grad_(False)
        frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
        hfslim.shrink(model, uneven(model, drop_layer=False))
        assert model.training
        assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen

    def test_works_in_half_precision(self):
        model = tiny("bert").to(torch.bfloat16)
        hfslim.shrink(model, uneven(model))
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize("family", ["bert", "mpnet", "deberta-v2", "wavlm", "swin"])
    @torch.no_grad()
    def test_hidden_states_and_attention_weights_can_be_asked_for(self, family):
        model = tiny(family)
        inputs = example_inputs(model, length=1200 if family == "wavlm" else 12)
        whole = len(model(**inputs, output_hidden_states=True).hidden_states)
        hfslim.shrink(model, uneven(model))
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        stages = family == "swin"
        assert len(outputs.hidden_states) == (whole if stages else whole - 1)
