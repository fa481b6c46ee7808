"""Losses on features, against figures worked out by hand or formulas written out plainly."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hfslim.distillation.losses import feature_losses
from hfslim.distillation.losses.layer_maps import dynamic_pairs, parse_map, static_pairs
from hfslim.distillation.losses.logit_losses import (
    correlation,
    decoupled_kl,
    distillation_loss,
    kl_divergence,
)


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_dkd_with_the_teachers_own_weight_is_kl() -> None:
    # KL = TCKD + (1 − p of the label) · NCKD, section 3.2 of the paper.
    student, teacher = states(4, 5), states(4, 5, seed=1)
    labels = torch.tensor([0, 3, 4, 1])
    rest = 1 - F.softmax(teacher / 2, -1)[range(4), labels]
    parts = [decoupled_kl(student, teacher, labels, 2.0, beta) for beta in (0.0, 1.0)]
    whole = parts[0] + rest * (parts[1] - parts[0])
    assert torch.allclose(whole, kl_divergence(student, teacher, 2.0), atol=1e-6)


def test_dkd_equals_the_papers_formula() -> None:
    student, teacher = states(4, 5), states(4, 5, seed=1)
    labels = torch.tensor([0, 3, 4, 1])
    expected = []
    for s, t, y in zip(student / 4, teacher / 4, labels, strict=True):
        p, q = F.softmax(t, -1), F.softmax(s, -1)
        others = [i for i in range(5) if i != y]
        target = p[y] * (p[y] / q[y]).log() + (1 - p[y]) * ((1 - p[y]) / (1 - q[y])).log()
        p, q = p[others] / p[others].sum(), q[others] / q[others].sum()
        expected.append(16 * (target + 8 * (p * (p / q).log()).sum()))
    assert torch.allclose(
        decoupled_kl(student, teacher, labels, 4.0, 8.0), torch.stack(expected), atol=1e-5
    )


def test_dkd_leaves_out_examples_without_a_label() -> None:
    loss = decoupled_kl(states(2, 3), states(2, 3, seed=1), torch.tensor([-100, 1]))
    assert loss[0] == 0 and loss[1] > 0


def test_dkd_of_a_teacher_that_is_sure_has_a_gradient() -> None:
    # The teacher's other two classes are e and 1 apart, 120 below the label.
    student = torch.zeros(1, 3, requires_grad=True)
    decoupled_kl(student, torch.tensor([[120.0, 0.0, 1.0]]), torch.tensor([0])).sum().backward()
    others = torch.tensor([1 / 2 - 1 / (1 + math.e), 1 / 2 - math.e / (1 + math.e)])
    expected = torch.tensor([1 / 3 - 1, 1 / 3 + others[0], 1 / 3 + others[1]])
    torch.testing.assert_close(student.grad[0], expected, rtol=0, atol=1e-6)


def test_dist_equals_numpys_correlations() -> None:
    student, teacher = states(6, 4), states(6, 4, seed=1)
    p, q = (F.softmax(x / 3, -1).numpy() for x in (teacher, student))
    rows = np.mean([1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(6)])
    columns = np.mean([1 - np.corrcoef(p[:, i], q[:, i])[0, 1] for i in range(4)])
    loss = correlation(student, teacher, 3.0).mean().item()
    assert loss == pytest.approx(9 * (rows + columns), abs=1e-5)
    assert correlation(student, student).abs().max() < 1e-6


def test_dist_of_two_classes_teaches_by_its_columns_alone() -> None:
    for examples, teaches in ((1, False), (3, True)):
        student = states(examples, 2).requires_grad_()
        correlation(student, states(examples, 2, seed=1)).sum().backward()
        assert bool(student.grad.abs().max() > 1e-3) is teaches


@pytest.mark.parametrize("kind", ["dkd", "dist"])
def test_losses_over_one_distribution_refuse_other_problems(kind: str) -> None:
    with pytest.raises(ValueError, match="use 'kl'"):
        distillation_loss(states(2, 3), states(2, 3), "multi_label_classification", 1.0, kind)
    with pytest.raises(ValueError, match="one integer label per example"):
        mixed = torch.rand(2, 3)
        distillation_loss(
            states(2, 3), states(2, 3), "single_label_classification", 1.0, "dkd", mixed
        )


MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


def test_hidden_mse_counts_each_example_the_same_and_no_padding() -> None:
    student, teacher = states(2, 4, 3), states(2, 4, 3, seed=1)
    squares = (student - teacher).square()
    expected = [squares[0, :3].mean(), squares[1, :2].mean()]
    assert torch.allclose(feature_losses.hidden_mse(student, teacher, MASK), torch.stack(expected))


def test_l1_cosine_by_hand() -> None:
    # |s − t| is 1 and 1, its mean 1; the vectors are at right angles: − log σ(0) = log 2.
    student, teacher = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    loss = feature_losses.hidden_l1_cosine(student, teacher).item()
    assert loss == pytest.approx(1 + math.log(2))


def test_attention_mse_divides_by_the_square_of_the_length() -> None:
    student, teacher = (states(2, h, 4, 4, seed=h).softmax(-1) for h in (2, 3))
    squares = (student.mean(1) - teacher.mean(1)).square()
    expected = [squares[0, :3, :3].sum() / 9, squares[1, :2, :2].sum() / 4]
    loss = feature_losses.attention_mse(student, teacher, MASK)
    assert torch.allclose(loss, torch.stack(expected))


def test_attention_kl_is_the_mean_over_heads_and_queries() -> None:
    student, teacher = (states(2, 3, 4, 4, seed=i).softmax(-1) for i in (0, 1))
    divergence = (teacher * (teacher / student).log()).sum(-1)
    expected = [divergence[0, :, :3].mean(), divergence[1, :, :2].mean()]
    loss = feature_losses.attention_kl(student, teacher, MASK)
    assert torch.allclose(loss, torch.stack(expected), atol=1e-6)


def test_relations_of_other_widths_and_heads_are_compared() -> None:
    student, teacher = states(1, 4, 6), states(1, 4, 8, seed=1)
    expected = []
    for head in range(2):
        s, t = student[0, :3, 3 * head : 3 * head + 3], teacher[0, :3, 4 * head : 4 * head + 4]
        q, p = F.softmax(s @ s.T / 3**0.5, -1), F.softmax(t @ t.T / 2, -1)
        expected.append((p * (p / q).log()).sum(-1).mean())
    loss = feature_losses.relation_kl(student, teacher, 2, MASK[:1])
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), abs=1e-6)
    with pytest.raises(ValueError, match="4 relation heads do not divide the widths 6"):
        feature_losses.relation_kl(student, teacher, 4)


@pytest.mark.parametrize(
    "loss",
    [
        feature_losses.hidden_mse,
        feature_losses.hidden_cosine,
        lambda s, t, mask: feature_losses.hidden_l1_cosine(s, t, mask) - math.log(1 + math.exp(-1)),
        lambda s, t, mask: feature_losses.relation_kl(s, t, 3, mask),
    ],
)
def test_equal_features_cost_nothing_and_padding_is_not_seen(
    loss: Callable[..., Tensor],
) -> None:
    student, teacher = states(2, 4, 6), states(2, 4, 6)
    teacher[0, 3:], teacher[1, 2:] = 7.0, -3.0
    assert loss(student, teacher, MASK).abs().max() < 1e-6
    assert loss(student, states(2, 4, 6, seed=1), MASK).min() > 1e-2


def test_layers_are_paired_by_number() -> None:
    assert static_pairs("uniform", 6, 12) == [(i, 2 * i + 1) for i in range(6)]
    assert static_pairs("uniform", 4, 2) == [(1, 0), (3, 1)]
    assert static_pairs("last", 3, 5) == [(0, 2), (1, 3), (2, 4)]
    assert static_pairs("skip", 2, 5) == [(0, 1), (1, 3)]


def test_the_dynamic_map_is_the_cheapest_in_order() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        costs = generator.random((3, 4))
        best = min(
            costs[0, a] + costs[1, b] + costs[2, c]
            for a in range(4)
            for b in range(a, 4)
            for c in range(b, 4)
        )
        pairs = dynamic_pairs(costs)
        assert [t for _, t in pairs] == [0, 1, 2]
        assert sorted(s for s, _ in pairs) == [s for s, _ in pairs]
        assert sum(costs[t, s] for s, t in pairs) == pytest.approx(best)


@pytest.mark.parametrize("wrong", ["deep", [[1, 0], [0, 1]], [[0]], "[[0, -1]]", 3, []])
def test_what_is_no_layer_map_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="layer_map is"):
        parse_map(wrong)
