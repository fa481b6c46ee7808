import math

import pytest
import torch
from torch.nn import functional as F
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.models.bert import BertConfig
from transformers.trainer_pt_utils import LabelSmoother

from hfslim.distillation.losses.logit_losses import (
    binary_kl_divergence,
    distillation_loss,
    kl_divergence,
    squared_error,
)
from hfslim.training.objective import hard_loss, problem_type


def test_kl_by_hand() -> None:
    # T = 2 turns the teacher's logits into (ln 3, 0): p = (3/4, 1/4); the student's q = (1/2, 1/2).
    teacher = torch.tensor([[2 * math.log(3), 0.0]])
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kl_divergence(torch.zeros(1, 2), teacher, 2.0).item() == pytest.approx(expected)


def test_kl_averages_to_batchmean() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    expected = 9 * F.kl_div(
        F.log_softmax(student / 3, -1), F.softmax(teacher / 3, -1), reduction="batchmean"
    )
    assert torch.allclose(kl_divergence(student, teacher, 3.0).mean(), expected)


def test_kl_gradient_is_the_difference_of_softmaxes_times_t() -> None:
    student = torch.zeros(1, 2, requires_grad=True)
    teacher = torch.tensor([[2 * math.log(3), 0.0]])
    kl_divergence(student, teacher, 2.0).sum().backward()
    assert torch.allclose(student.grad, torch.tensor([[2 * (0.5 - 0.75), 2 * (0.5 - 0.25)]]))


def test_binary_kl_by_hand() -> None:
    # Class 0: p = 3/4 against 1/2; class 1: both 1/2, which adds nothing.
    teacher = torch.tensor([[2 * math.log(3), 0.0]])
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert binary_kl_divergence(torch.zeros(1, 2), teacher, 2.0).item() == pytest.approx(expected)


def test_binary_kl_is_finite_for_a_certain_teacher() -> None:
    loss = binary_kl_divergence(torch.zeros(1, 2), torch.tensor([[1e4, -1e4]]))
    assert loss.item() == pytest.approx(math.log(2))


def test_equal_logits_cost_nothing() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    assert kl_divergence(logits, logits + 3).item() == pytest.approx(0, abs=1e-6)
    assert binary_kl_divergence(logits, logits).item() == pytest.approx(0, abs=1e-6)
    assert squared_error(logits, logits).item() == 0


def test_losses_are_computed_in_float32() -> None:
    student = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    teacher = torch.tensor([[3.0, 5.0]], dtype=torch.bfloat16)
    for problem in ("regression", "single_label_classification", "multi_label_classification"):
        assert distillation_loss(student, teacher, problem, 2.0).dtype == torch.float32
    assert squared_error(student, teacher).item() == pytest.approx((4 + 9) / 2)


def test_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\], the teacher's \[2, 4\]"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4), "regression", 1.0)


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [
        (3, torch.tensor([2, 0, 1, 1])),
        (3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])),
        (1, torch.tensor([0.5, -1.0, 2.0, 0.0])),
    ],
)
def test_hard_loss_and_problem_type_are_those_of_transformers(
    outputs: int, labels: torch.Tensor
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, outputs)
    config = BertConfig(num_labels=outputs)
    ours = problem_type(config, labels)
    expected = ForSequenceClassificationLoss(labels, logits, config)
    assert config.problem_type == ours
    assert torch.allclose(hard_loss(logits, labels, ours).mean(), expected)


def test_label_smoothing_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    expected = LabelSmoother(epsilon=0.1)({"logits": logits}, labels)
    ours = hard_loss(logits, labels, "single_label_classification", 0.1)
    assert torch.allclose(ours.mean(), expected)


def test_an_example_without_a_label_costs_nothing() -> None:
    loss = hard_loss(torch.zeros(2, 4), torch.tensor([-100, 1]), "single_label_classification")
    assert loss.tolist() == pytest.approx([0.0, math.log(4)])


@pytest.mark.parametrize(
    ("logits", "labels", "problem", "smoothing", "message"),
    [
        ((2, 3), torch.zeros(2, 3), "single_label_classification", 0.0, "one integer label"),
        ((2, 3), torch.zeros(2), "multi_label_classification", 0.0, r"expected \[2, 3\]"),
        ((2, 1), torch.zeros(2), "regression", 0.1, "set it to 0"),
        ((2, 4, 3), torch.zeros(2), "regression", 0.0, r"\[2, 4, 3\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    logits: tuple[int, ...], labels: torch.Tensor, problem: str, smoothing: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        hard_loss(torch.zeros(logits), labels, problem, smoothing)
