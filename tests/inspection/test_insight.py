"""How alike layers are, which units two scorings agree on, what became of the predictions."""

import numpy as np
import pytest
import torch
from models import tiny

from hfslim.anatomy.inputs import example_inputs
from hfslim.inspection import layer_similarity, linear_cka, prediction_changes, unit_agreement
from hfslim.reporting.plots.heat_maps import class_map


def unbiased_hsic(x, y):
    """The sum over quadruples of different examples that the estimate equals (Song et al. 2012)."""
    k, m, n = x @ x.T, y @ y.T, len(x)
    total, count = 0.0, 0
    for i in range(n):
        for j in set(range(n)) - {i}:
            for q in set(range(n)) - {i, j}:
                for r in set(range(n)) - {i, j, q}:
                    total += k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
                    count += 1
    return total / count


def test_cka_is_the_ratio_of_unbiased_hsic_over_all_quadruples():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(7, size, generator=generator).double() for size in (5, 3))
    y += x[:, :3]
    expected = unbiased_hsic(x, y) / (unbiased_hsic(x, x) * unbiased_hsic(y, y)).sqrt()
    torch.testing.assert_close(linear_cka(x, y), expected)
    turned = x @ torch.linalg.qr(torch.randn(5, 5, generator=generator).double())[0]
    torch.testing.assert_close(linear_cka(x, 3 * turned + 1), torch.ones(()).double())


def test_unrelated_features_are_not_alike_however_many_there_are():
    """The biased estimate would give 0.9 here: with more features than examples all look alike."""
    generator = torch.Generator().manual_seed(0)
    values = [
        linear_cka(
            torch.randn(16, 300, generator=generator), torch.randn(16, 300, generator=generator)
        )
        for _ in range(20)
    ]
    assert abs(torch.stack(values).mean()) < 0.05


def data(model):
    """Two batches of six, some rows of the first padded."""
    batches = [example_inputs(model, 6, seed, 8) for seed in (0, 1)]
    batches[0]["attention_mask"][:3, 4:] = 0
    return batches


def test_layers_are_compared_by_means_over_what_is_no_padding():
    model = tiny("bert").eval()
    found = layer_similarity(model, data(model), progress=False)
    layers = len(model.bert.encoder.layer)
    sums = torch.zeros(layers, layers, dtype=torch.float64)
    with torch.no_grad():
        for batch in data(model):
            hidden = model(**batch, output_hidden_states=True).hidden_states[1:]
            rows = [
                torch.stack(
                    [
                        x[: mask.sum()].mean(0)
                        for x, mask in zip(h, batch["attention_mask"], strict=True)
                    ]
                )
                for h in hidden
            ]
            rows = [row.double() for row in rows]
            for i, x in enumerate(rows):
                for j, y in enumerate(rows):
                    sums[i, j] += unbiased_hsic(x, y)
    scale = sums.diagonal().sqrt()
    torch.testing.assert_close(found, sums / torch.outer(scale, scale), rtol=1e-4, atol=1e-5)
    # What stands in padding changes nothing.
    other = data(model)
    other[0]["input_ids"][:3, 4:] = 7
    torch.testing.assert_close(layer_similarity(model, other, progress=False), found)


def test_two_models_of_other_depths_are_compared_layer_by_layer():
    model, other = tiny("bert"), tiny("bert", num_hidden_layers=2)
    found = layer_similarity(model, data(model), other, progress=False)
    assert found.shape == (3, 2)
    torch.testing.assert_close(layer_similarity(other, data(model), model, progress=False), found.T)


def test_what_gives_no_similarity_is_refused():
    model = tiny("bert")
    small = {name: value[:3] for name, value in data(model)[0].items()}
    with pytest.raises(ValueError, match="no batch of at least 4 examples"):
        layer_similarity(model, [small], progress=False)


def test_agreement_counts_what_both_keep_of_a_kind():
    first = {
        ("heads", "a"): torch.tensor([4.0, 1.0]),
        ("heads", "b"): torch.tensor([3.0, 2.0]),
        ("layers", "x"): torch.tensor([1.0, 2.0, 3.0]),
    }
    second = {
        ("heads", "a"): torch.tensor([40.0, 30.0]),
        ("heads", "b"): torch.tensor([20.0, 10.0]),
        ("layers", "x"): torch.tensor([3.0, 2.0, 1.0]),
    }
    heads, layers = unit_agreement(first, second, kept=(0.5, 0.25))
    assert heads.shared == {0.5: 0.5, 0.25: 1.0}
    assert heads.kept_by_both == {0.5: {"a": (0,), "b": ()}, 0.25: {"a": (0,), "b": ()}}
    # Ranks 4 1 3 2 and 4 3 2 1: 1 - 6 · (0 + 4 + 1 + 1) / (4 · 15).
    assert heads.rank_correlation == pytest.approx(0.4)
    assert heads.by_site == pytest.approx({"a": 1.0, "b": 1.0})
    assert layers.rank_correlation == pytest.approx(-1.0)


def test_scores_of_other_units_do_not_agree_or_disagree():
    first = {("heads", "a"): torch.ones(4)}
    with pytest.raises(ValueError, match="at the heads of 'a' there are 4 and 3"):
        unit_agreement(first, {("heads", "a"): torch.ones(3)})
    with pytest.raises(ValueError, match="up to 1"):
        unit_agreement(first, first, kept=(1.5,))


def test_changes_are_told_by_example_and_by_class():
    labels = np.array([0, 0, 1, 1, 2, 2])
    before = np.eye(3)[[0, 0, 1, 0, 0, 2]] * 2
    after = np.eye(3)[[0, 1, 2, 1, 1, 2]] * np.array([[1, 1, 5, 1, 1, 1]]).T
    found = prediction_changes(before, after, labels, ["a", "b", "c"])
    assert [(c.example, c.outcome, c.before, c.after) for c in found.changes] == [
        (2, "lost", "b", "c"),
        (1, "lost", "a", "b"),
        (3, "gained", "a", "b"),
        (4, "other", "a", "b"),
    ]
    assert found.changes[0].confidence_after == pytest.approx(np.exp(5) / (np.exp(5) + 2))
    counts = [
        (c.examples, c.right_before, c.right_after, c.lost, c.gained, c.other)
        for c in found.classes
    ]
    assert counts == [(2, 2, 1, 1, 0, 0), (2, 1, 1, 1, 1, 0), (2, 1, 1, 0, 0, 1)]
    with pytest.raises(ValueError, match="one class per example"):
        prediction_changes(before, after, np.eye(3)[labels], ["a", "b", "c"])


def test_a_map_of_classes_shows_places_or_the_units_of_one_place():
    shares = {
        ("heads", "a"): torch.tensor([[0.2, 0.2], [0.1, 0.1]]),
        ("heads", "b"): torch.tensor([[0.3, 0.3], [0.7, 0.1]]),
    }
    panel = class_map("heads", shares, ["cat"])
    torch.testing.assert_close(panel.values, torch.tensor([[0.5, 0.8 / 0.6]]))
    layers = {("layers", "x"): torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.0, 0.5]])}
    panel = class_map("layers", layers, ["cat"])
    torch.testing.assert_close(panel.values, torch.tensor([[1.0, 0.0, 2.5]]))
    assert panel.columns == ["0", "1", "2"]
