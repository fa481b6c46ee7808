import copy

import pytest
import torch
from models import tiny
from structures import Unchanged
from transformers import BartConfig, BartForSequenceClassification

import hfslim
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.measuring.measurement import count_parameters, macs
from hfslim.pruning import PruneResult, UnreachableTargetError
from hfslim.pruning.scores.batches import Batches
from hfslim.pruning.search.search import Search
from hfslim.pruning.steps import calibrate, cut, decide
from hfslim.pruning.target import Target

TEXTS = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
BART = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


def _data(model, batches=2, labels=True):
    for seed in range(batches):
        batch = example_inputs(model, 4, seed, length=8)
        yield batch | ({"labels": torch.arange(4) % 3} if labels else {})


def _prune(model, data=None, **options):
    settings = {"target": {"macs": 0.6}, "progress": False} | options
    return hfslim.prune(model, list(_data(model)) if data is None else data, **settings)


@pytest.mark.parametrize(
    "target",
    [
        {"macs": 0},
        {"macs": 1.01},
        {"macs": -0.5},
        {"macs": float("nan")},
        {"macs": "half"},
        {"macs": True},
        {"latency": 1.5},
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
    with Unchanged(model), pytest.raises(ValueError, match="target"):
        _prune(model, target=target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": ("head",)}, "unknown kind of unit 'head'"),
        ({"units": ()}, "no kind of unit given"),
        ({"criterion": "hessian"}, "criterion for heads: got 'hessian'"),
        ({"data": []}, "calibration data is empty"),
        ({"data": {"input_ids": torch.ones(2, 3)}}, "data gives str where a batch is expected"),
        (
            {"data": [{**TEXTS, "labels": torch.tensor([0, 3])}], "criterion": "fisher"},
            "the model has classes 0 to 2",
        ),
        ({"data": [{"input_ids": [[1, 2]]}]}, r"holds no tensors, only \['input_ids'\]"),
    ],
)
def test_an_argument_that_cannot_work_is_refused(options, message):
    model = tiny("bert")
    with Unchanged(model), pytest.raises(ValueError, match=message):
        _prune(model, **options)


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "activation", "magnitude"])
def test_weights_that_are_not_finite_are_refused(criterion):
    model = tiny("bert")
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        _prune(model, criterion=criterion)
    assert find_units(model).full().counts()["heads"] == (12, 12)


def test_the_number_of_calibration_examples_is_limited():
    with pytest.raises(ValueError, match="max_examples must be at least 1"):
        Batches([], 0)
    limited, first = tiny("bert"), tiny("bert")
    data = list(_data(limited))
    found = _prune(limited, Batches(data, 4))
    for key, values in _prune(first, data[:1]).scores.items():
        assert torch.equal(found.scores[key], values)


def test_one_calibration_cuts_to_any_target():
    """A generator serves as often as a list, and copies are cut as the model itself would be."""
    model, copies = tiny("bert"), [tiny("bert"), tiny("bert")]
    units = find_units(model).of(("heads", "neurons"))
    criteria = {"heads": "obs", "neurons": "obs"}
    calibration = calibrate(model, units, Batches(_data(model), 64), criteria, progress=False)
    for copied, kept in zip(copies, (0.8, 0.6), strict=True):
        goal = Target.parse({"parameters": kept}, ("heads", "neurons"))
        structure, _ = decide(Search.priced(copied, units, goal), calibration.scores)
        cut(copied, structure, calibration)
        alone = tiny("bert")
        _prune(alone, target={"parameters": kept})
        batch = example_inputs(model, 2, length=8)
        torch.testing.assert_close(copied(**batch).logits, alone(**batch).logits)


def test_a_target_below_the_least_reachable_is_refused_before_any_scoring():
    model = tiny("bert")

    def data():
        raise AssertionError("the data was touched")
        yield

    with Unchanged(model), pytest.raises(UnreachableTargetError, match="cannot be reached"):
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
    with Unchanged(model):
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


def test_fisher_keeps_a_trained_skill_where_chance_loses_it():
    """The label is in one token, which attention has to fetch."""

    def examples(seed, size=32):
        tokens = torch.randint(64, (size, 12), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": tokens, "labels": tokens[:, 5] % 3}

    model = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(300):
        optimizer.zero_grad()
        model(**examples(step)).loss.backward()
        optimizer.step()
    model.eval()
    unseen, accuracy = examples(10**6, 300), {}
    for criterion in ("fisher", "random"):
        cut = copy.deepcopy(model)
        _prune(cut, [examples(10**5, 64)], target={"macs": 0.3}, criterion=criterion)
        with torch.no_grad():
            right = cut(**unseen).logits.argmax(-1) == unseen["labels"]
        accuracy[criterion] = right.float().mean().item()
    assert accuracy["fisher"] > 0.9
    assert accuracy["random"] < 0.6


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


def test_an_encoder_with_a_decoder_loses_units_of_both(tmp_path):
    widths = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in BART.items()}
    config = BartConfig(d_model=32, vocab_size=64, max_position_embeddings=40, **widths)
    config.num_labels, config.eos_token_id, config.decoder_start_token_id = 3, 2, 2
    model = BartForSequenceClassification(config).eval()
    inputs = example_inputs(model, 4, length=8)
    batch = inputs | {"labels": torch.arange(4) % 3}
    units = ("heads", "neurons", "layers")
    pruned = hfslim.prune(model, [batch], {"sparsity": 0.5}, units, progress=False)
    cut = {entry.path for entry in pruned.structure if len(entry.kept) < entry.total}
    assert any("decoder" in path for path in cut)
    model = hfslim.prune(
        model, [batch], {"sparsity": {"heads": 0.6}}, ("heads",), progress=False
    ).model
    model.save_pretrained(tmp_path)
    again = BartForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_a_result_is_printed_in_a_line() -> None:
    model = tiny("bert")
    result = PruneResult(find_units(model).full(), model, {})
    shown = repr(result)
    parameters = sum(one.numel() for one in model.parameters())
    assert "\n" not in shown and str(result.structure) in shown
    assert f"of BertForSequenceClassification, {parameters:,} parameters" in shown
