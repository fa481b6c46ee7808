"""Each criterion against an independent computation, and what all of them have in common."""

import copy
import itertools

import pytest
import torch
from models import tiny
from places import ROOT
from structures import Unchanged
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import hfslim
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.measuring.measurement import macs
from hfslim.pruning import CRITERIA, UnusableScoresError, spaced_layers
from hfslim.pruning.gates.gates import Gates
from hfslim.pruning.scores.collect import collect
from hfslim.pruning.scores.collector import Collector
from hfslim.pruning.scores.criteria import OUTPUT_NORM, criteria_by_kind
from hfslim.pruning.scores.importance import fisher_factors, output_norm
from hfslim.pruning.scores.layers import spacing

HEADS = ("heads", "bert.encoder.layer.1.attention.self")
LAYERS = ("layers", "bert.encoder.layer")
BERT = ("heads", "neurons", "layers")
CALIBRATED = [name for name, entry in CRITERIA.items() if "calibration" in entry.when]


def _inputs(model, size=5, seed=0, length=8):
    return example_inputs(model, size, seed, length)


def _batch(model, size=5, seed=0):
    return _inputs(model, size, seed) | {"labels": torch.arange(size) % 3}


def _collect(model, data, criterion, kinds, **options):
    units = find_units(model).of(kinds)
    return collect(
        model, units, data, criteria_by_kind(criterion, kinds), progress=False, **options
    )


def _curvature_of_heads(model, inputs, divergence):
    """The second derivative of a divergence by the gates of one layer's heads, example by example.

    The gates multiply columns of the output projection, and autograd is asked twice.
    """
    name = "bert.encoder.layer.1.attention.output.dense.weight"
    weight = model.get_parameter(name).detach()
    rows = []
    for example in range(len(inputs["input_ids"])):
        one = {key: value[example : example + 1] for key, value in inputs.items()}

        def changed(gates, one=one):
            scaled = weight * gates.repeat_interleave(8)
            now = functional_call(model, {name: scaled}, kwargs=one).logits
            return divergence(model(**one).logits.detach().double(), now.double())

        hessian = torch.autograd.functional.hessian(changed, torch.ones(4))
        rows.append(hessian.diagonal())
    return torch.stack(rows)


def _kl(before, after, temperature=2.0):
    p, q = ((x / temperature).log_softmax(-1) for x in (before, after))
    return temperature**2 * (p.exp() * (p - q)).sum()


def _kl_of_questions(before, after, temperature=2.0):
    p, q = (before / temperature).sigmoid(), (after / temperature).sigmoid()
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    return temperature**2 * each.mean()


def _square(before, after):
    return (before - after).square().mean()


@pytest.mark.parametrize(
    ("overrides", "divergence"),
    [
        ({}, _kl),
        ({"problem_type": "multi_label_classification"}, _kl_of_questions),
        ({"problem_type": "regression", "num_labels": 2}, _square),
    ],
    ids=["classes", "questions", "regression"],
)
def test_kl_fisher_is_half_the_curvature_of_the_divergence_and_the_output_norm(
    overrides, divergence
):
    model = tiny("bert", **overrides)
    inputs = _inputs(model)
    found = _collect(model, [inputs], "kl_fisher", ("heads", "neurons"))[HEADS]
    curvature = _curvature_of_heads(model, inputs, divergence)

    attention, fed = model.bert.encoder.layer[1].attention, []
    handle = attention.output.dense.register_forward_pre_hook(lambda _, x: fed.append(x[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    norms = []
    for head in range(4):
        columns = slice(8 * head, 8 * head + 8)
        added = fed[0][..., columns] @ attention.output.dense.weight[:, columns].T
        norms.append(added.square().mean().item())
    expected = curvature.mean(0) / 2 + OUTPUT_NORM * torch.tensor(norms)
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-10)


def test_fisher_without_labels_is_the_fisher_information_of_the_predictions():
    model = tiny("bert")
    inputs = _inputs(model)
    found = _collect(model, [inputs], "fisher", ("heads",))[HEADS]
    expected = _curvature_of_heads(model, inputs, lambda a, b: _kl(a, b, 1.0)).mean(0)
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-10)


def test_of_many_classes_the_least_likely_count_as_one():
    torch.manual_seed(0)
    logits, change = torch.randn(1, 20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    gate = torch.zeros((), dtype=torch.float64, requires_grad=True)
    factors = fisher_factors(logits + gate * change, "single_label_classification")
    assert factors.shape == (1, 8)
    found = sum(torch.autograd.grad(r, gate, retain_graph=True)[0].square() for r in factors[0])

    p, score = logits.softmax(-1)[0], change - (logits.softmax(-1)[0] * change).sum()
    order = p.argsort(descending=True)
    first, rest = order[:7], order[7:]
    together = (p[rest] * score[rest]).sum() ** 2 / p[rest].sum()
    expected = (p[first] * score[first].square()).sum() + together
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected < (p * score.square()).sum()


def test_output_norm_ignores_padding():
    torch.manual_seed(0)
    value, projection = torch.randn(3, 6, 8), torch.randn(5, 8)
    weight = torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2, [1.0] + [0.0] * 5])
    found = output_norm(value, projection, 4, weight)
    expected = torch.zeros(4)
    for example, positions in enumerate((6, 4, 1)):
        for unit in range(4):
            part = slice(2 * unit, 2 * unit + 2)
            added = value[example, :positions, part] @ projection[:, part].T
            expected[unit] += added.square().mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def _loss_of(model, layers, batch):
    """The loss of a copy that has only some of the layers."""
    cut = copy.deepcopy(model)
    cut.bert.encoder.layer = nn.ModuleList(cut.bert.encoder.layer[i] for i in layers)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        return cross_entropy(cut(**inputs).logits.double(), batch["labels"]).item()


def test_loss_delta_removes_the_layer_that_hurts_least_and_scores_again():
    model = tiny("bert", num_hidden_layers=5)
    batch = _batch(model, 12)
    parts = [{k: v[i : i + 5] for k, v in batch.items()} for i in (0, 5, 10)]
    scores = _collect(model, parts, "loss_delta", ("layers",))[LAYERS]
    left, order, rises = list(range(5)), [], []
    loss = _loss_of(model, left, batch)
    while len(left) > 1:
        losses = {i: _loss_of(model, [j for j in left if j != i], batch) for i in left}
        gone = min(losses, key=losses.__getitem__)
        order.append(gone)
        rises.append(max(losses[gone] - loss, rises[-1] if rises else 0.0))
        left.remove(gone)
        loss = losses[gone]
    once = [_loss_of(model, [j for j in range(5) if j != i], batch) for i in range(5)]
    assert order != sorted(range(5), key=once.__getitem__)[:4]  # scoring once ranks otherwise
    assert scores.argsort().tolist() == [*order, *left]
    assert scores[order].tolist() == pytest.approx(rises, abs=1e-6)


@pytest.mark.parametrize("layers", [3, 6, 12, 24])
def test_spaced_layers_are_evenly_spaced_at_every_number(layers):
    scores = spacing(layers)
    assert sorted(scores) == [(i + 1) / layers for i in range(layers)]
    going = sorted(range(layers), key=scores.__getitem__)
    for keep in range(2, layers):
        kept = sorted(going[layers - keep :])
        gaps = [b - a for a, b in itertools.pairwise(kept)]
        assert (kept[0], kept[-1]) == (0, layers - 1)
        assert max(gaps) <= 2 * -(-(layers - 1) // (keep - 1))
    half = sorted(going[layers // 2 :])
    assert max(b - a for a, b in itertools.pairwise(half)) <= 3


def test_the_depth_is_chosen_at_evaluation():
    model = tiny("bert", num_hidden_layers=6)
    inputs = _inputs(model)
    with Unchanged(model), hfslim.gated(model, spaced_layers(model, 3)), torch.no_grad():
        found = model(**inputs).logits
    model.bert.encoder.layer = nn.ModuleList(model.bert.encoder.layer[i] for i in (0, 2, 5))
    with torch.no_grad():
        torch.testing.assert_close(found, model(**inputs).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep", [0, 7])
def test_a_depth_that_the_model_does_not_have_is_refused(keep):
    with pytest.raises(ValueError, match=f"1 to 3; got {keep}"):
        spaced_layers(tiny("bert"), keep)


@pytest.mark.parametrize("criterion", ["spaced", "loss_delta", "block_influence", "fisher"])
def test_layers_are_pruned_by(criterion):
    model = tiny("bert", num_hidden_layers=4)
    inputs = _inputs(model, 1)
    whole = macs(model, inputs)
    result = hfslim.prune(
        model,
        [_batch(model)],
        {"macs": 0.55},
        units=["layers"],
        criterion=criterion,
        inputs=inputs,
        progress=False,
    )
    assert result.structure.counts() == {"layers": (2, 4)}
    assert macs(model, inputs) / whole <= 0.55
    order = result.scores[LAYERS].argsort().tolist()
    assert result.structure.kept(*LAYERS) == tuple(sorted(order[2:]))


def _sums(model, data, criterion, kinds):
    """Scores before any mean, normalisation or removal: what ranks add."""
    gates = Gates(model, find_units(model).of(kinds))
    collector = Collector(gates, criteria_by_kind(criterion, kinds))
    with gates:
        collector.start()
        for batch in data:
            labels = batch.get("labels")
            collector.unlabelled = labels is None
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
            if collector.needs_loss:
                cross_entropy(logits, labels, reduction="sum").backward()
    return collector.scores


@pytest.mark.parametrize(
    ("criterion", "labelled"),
    [
        (name, labelled)
        for name in CALIBRATED
        for labelled in (True, False)
        if CRITERIA[name].gradient or CRITERIA[name].activation
        if labelled or CRITERIA[name].labels != "needed"
    ],
)
def test_scores_of_a_split_calibration_set_add_up(criterion, labelled):
    model = tiny("bert")
    kinds = [kind for kind in CRITERIA[criterion].kinds if kind in BERT]
    data = [_batch(model, size, seed) for size, seed in ((3, 0), (5, 1), (2, 2))]
    if not labelled:
        data = [{k: v for k, v in batch.items() if k != "labels"} for batch in data]
    one = {k: torch.cat([batch[k] for batch in data]) for k in data[0]}
    whole = _sums(model, [one], criterion, kinds)
    parts = [_sums(model, [batch], criterion, kinds) for batch in data]
    assert whole.count == sum(part.count for part in parts) == 10
    for key, value in whole.sums.items():
        total = sum(part.sums[key] for part in parts)
        assert value.abs().sum() > 0
        torch.testing.assert_close(total, value, rtol=1e-6, atol=1e-6 * value.abs().max().item())


@pytest.mark.parametrize("criterion", [n for n in CALIBRATED if CRITERIA[n].labels == "needed"])
def test_data_without_labels_is_refused_where_they_are_needed(criterion):
    model = tiny("bert")
    kinds = [kind for kind in CRITERIA[criterion].kinds if kind in BERT]
    with Unchanged(model), pytest.raises(ValueError, match=f"{criterion} needs labels") as error:
        hfslim.prune(model, [_inputs(model)], {"macs": 0.7}, kinds, criterion, progress=False)
    for name in CALIBRATED:
        assert (f"'{name}'" in str(error.value)) == (CRITERIA[name].labels != "needed")


@pytest.mark.parametrize("criterion", sorted(set(CALIBRATED) - {"spaced", "random"}))
def test_a_model_that_is_not_finite_is_refused_by_module_and_unchanged(criterion):
    model = tiny("bert")
    weight = model.bert.encoder.layer[1].output.dense.weight
    weight.data[0, 0] = float("nan")
    kinds = [kind for kind in CRITERIA[criterion].kinds if kind in BERT]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    how = {"reconstruction": "weights" if criterion == "obs" else "none", "progress": False}
    data, where = [_batch(model)], r"output of 'bert\.encoder\.layer\.1\.output\.dense' is"
    if CRITERIA[criterion].weights:
        where = r"layers at 'bert\.encoder\.layer' are"
    with pytest.raises(UnusableScoresError, match=f"{where} not finite: check the model's"):
        hfslim.prune(model, data, {"macs": 0.7}, kinds, criterion, **how)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True, rtol=0, atol=0)


def test_an_input_that_is_not_finite_is_refused_by_name():
    model = tiny("vit")
    batch = _inputs(model, 3) | {"labels": torch.arange(3)}
    batch["pixel_values"][1, 0, 0, 0] = float("inf")
    with Unchanged(model), pytest.raises(UnusableScoresError, match="the input 'pixel_values' is"):
        _collect(model, [batch], "fisher", ("heads",))


@pytest.mark.parametrize(
    ("criterion", "kinds", "message"),
    [
        ("kl_fisher", ("heads", "layers"), r"kl_fisher scores heads and neurons, not layers; for"),
        ("loss_delta", ("heads",), "loss_delta scores layers, not heads"),
        ("movement", ("heads",), "movement is measured while training: use PruningCallback"),
        ({"heads": "fisher"}, ("heads", "neurons"), "criterion for neurons: got None"),
        ("fischer", ("heads",), "got 'fischer', expected one of"),
    ],
)
def test_a_criterion_that_does_not_fit_is_refused_with_those_that_do(criterion, kinds, message):
    model = tiny("bert")
    with Unchanged(model), pytest.raises(ValueError, match=message) as error:
        hfslim.prune(model, [_batch(model)], {"macs": 0.7}, kinds, criterion, progress=False)
    assert "'taylor'" in str(error.value)


def test_kinds_go_by_criteria_of_their_own():
    model = tiny("bert", num_hidden_layers=4)
    criterion = {"heads": "kl_fisher", "neurons": "fisher", "layers": "loss_delta"}
    units = ("heads", "neurons", "layers")
    result = hfslim.prune(model, [_batch(model)], {"macs": 0.6}, units, criterion, progress=False)
    totals = dict.fromkeys(units, 0.0)
    for (kind, _), value in result.scores.items():
        totals[kind] += value.sum().item()
    assert totals == pytest.approx(dict.fromkeys(units, 1.0))


def test_every_criterion_names_its_source():
    assert all(entry.paper for entry in CRITERIA.values())
    sources = ("gradient", "activation", "weights", "removal", "eliminates", "learned")
    assert all(any(getattr(entry, s) for s in sources) for entry in CRITERIA.values())


def test_the_documentation_has_the_table_of_criteria():
    page = (ROOT / "docs" / "pruning.md").read_text(encoding="utf-8")
    section = page.partition("\n## Criteria\n")[2].partition("\n## ")[0]
    rows = [
        f"| `{name}` | {', '.join(c.kinds)} | {', '.join(c.when)} | {c.labels} | {c.paper} |"
        for name, c in CRITERIA.items()
    ]
    assert [line for line in section.splitlines() if line.startswith("| `")] == rows
