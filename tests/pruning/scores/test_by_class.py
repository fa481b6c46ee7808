"""Importance by class, and pruning for some classes."""

import pytest
import torch
from models import tiny
from torch.nn.functional import cross_entropy

import hfslim
from hfslim.anatomy.inputs import example_inputs
from hfslim.pruning import importance_by_class
from hfslim.pruning.scores.batches import Batches, class_numbers
from hfslim.pruning.scores.collect import collect
from hfslim.pruning.scores.criteria import criteria_by_kind

NEURONS = ("neurons", "bert.encoder.layer.0.intermediate")


def labelled(model, labels, length=8, seed=0):
    labels = torch.tensor(labels)
    return example_inputs(model, len(labels), seed, length) | {"labels": labels}


def batches(model):
    """Classes of 5, 2 and 4 examples, mixed over batches, one of them padded."""
    first = labelled(model, [0, 1, 0, 2, 2])
    first["attention_mask"][0, 5:] = 0
    return [first, labelled(model, [2, 0, 0, 1, 0, 2], seed=1)]


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "kl_fisher", "activation"])
def test_the_classes_add_up_to_the_whole(criterion):
    model = tiny("bert")
    kinds = ("heads", "neurons")
    parts = importance_by_class(model, batches(model), kinds, criterion, progress=False)
    units = hfslim.find_units(model).of(kinds)
    criteria = criteria_by_kind(criterion, kinds)
    whole = collect(model, units, batches(model), criteria, progress=False)
    assert parts.examples.tolist() == [5, 2, 4]
    assert parts.by_class.keys() == whole.keys()
    for key, total in whole.items():
        assert parts.by_class[key].shape == (3, len(total))
        error = (parts.by_class[key].sum(0) - total).abs().max()
        assert error <= 1e-6 * total.abs().max()


def test_layers_and_criteria_of_each_kind_add_up_too():
    model = tiny("bert")
    criterion = {"heads": "fisher", "neurons": "activation", "layers": "block_influence"}
    parts = importance_by_class(model, batches(model), list(criterion), criterion, progress=False)
    for key, total in parts.scores.items():
        torch.testing.assert_close(parts.by_class[key].sum(0), total, rtol=1e-6, atol=0)


def test_a_class_gets_the_squared_gradients_of_its_own_examples():
    model = tiny("bert")
    (batch, _) = batches(model)
    parts = importance_by_class(model, [batch], ["heads"], progress=False)
    weight = model.get_submodule("bert.encoder.layer.1.attention.output.dense").weight
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for row, label in enumerate(batch["labels"]):
        one = {name: value[row : row + 1] for name, value in batch.items() if name != "labels"}
        loss = cross_entropy(model(**one).logits, label[None])
        (gradient,) = torch.autograd.grad(loss, [weight])
        expected[label] += (weight * gradient).reshape(-1, 4, 8).sum((0, 2)).detach().square() / 5
    found = parts.by_class["heads", "bert.encoder.layer.1.attention.self"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-10)


def test_shares_of_a_kind_add_up_to_one_for_all_and_for_each_class():
    model = tiny("bert")
    data = [labelled(model, [0, 2, 2, 0])]
    shares = importance_by_class(model, data, progress=False).shares("neurons")
    sums = sum(share.sum(1) for share in shares.values())
    torch.testing.assert_close(sums, torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("labels", "criterion", "message"),
    [
        (None, "fisher", "the batch has none"),
        ([[1, 0, 0]], "fisher", r"of shape \(1, 3\)"),
        ([-100], "fisher", "labels go from -100 to -100"),
        ([0], "magnitude", "magnitude for heads does not score example by example"),
        ([0], "obs", "use one of .'fisher'"),
    ],
)
def test_what_has_no_importance_by_class_is_refused(labels, criterion, message):
    model = tiny("bert")
    batch = example_inputs(model, 1, length=8)
    if labels is not None:
        batch["labels"] = torch.tensor(labels)
    with pytest.raises(ValueError, match=message):
        importance_by_class(model, [batch], ["heads"], criterion, progress=False)


def test_only_examples_of_the_chosen_classes_count_towards_the_most():
    model = tiny("bert")
    found = list(Batches(iter(batches(model)), 5, classes=(0, 1)))
    assert [batch["labels"].tolist() for batch in found] == [[0, 1, 0], [0, 0]]
    rows = batches(model)[1]["input_ids"][[1, 2]]
    assert torch.equal(found[1]["input_ids"], rows)
    several = {"labels": torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]), "x": torch.arange(2)}
    (found,) = Batches([several], 5, classes=(2,))
    assert found["x"].tolist() == [0]


@pytest.mark.parametrize("criterion", ["obs", "fisher"])
def test_pruning_for_some_classes_is_pruning_by_their_examples(criterion):
    models = [tiny("bert") for _ in range(2)]
    names = models[0].config.id2label
    ours = hfslim.prune(
        models[0],
        batches(models[0]),
        target={"macs": 0.6},
        criterion=criterion,
        classes=[names[2], 1],
        progress=False,
    )
    data = [
        {name: value[batch["labels"] > 0] for name, value in batch.items()}
        for batch in batches(models[1])
    ]
    by_hand = hfslim.prune(
        models[1], data, target={"macs": 0.6}, criterion=criterion, progress=False
    )
    assert ours.structure == by_hand.structure
    for one, other in zip(ours.model.parameters(), by_hand.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_classes_that_cannot_be_chosen_are_refused():
    model = tiny("bert")
    with pytest.raises(ValueError, match=r"\['LABEL_9'\]: expected some of \['LABEL_0'"):
        class_numbers(model.config, ["LABEL_9"])
    with pytest.raises(ValueError, match=r"classes \[3\]: expected"):
        hfslim.prune(model, batches(model), target={"macs": 0.6}, classes=[3])
    with pytest.raises(ValueError, match="calibration data has none"):
        hfslim.prune(model, [example_inputs(model)], target={"macs": 0.6}, classes=[0])
    data = [labelled(model, [0, 1])]
    with pytest.raises(ValueError, match="none of the classes"):
        hfslim.prune(model, data, target={"macs": 0.6}, classes=[2], progress=False)
