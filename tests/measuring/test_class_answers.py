"""What an average hides: confusion, churn and calibration against figures worked out by hand."""

import numpy as np
import pytest

from hfslim.measuring.class_answers import ClassAnswers, calibration_error, churn

A, B, C = range(3)


def logits(*answers: int, sure: float = 4.0) -> np.ndarray:
    return np.eye(3)[list(answers)] * sure


def test_confusion_counts_true_classes_down_and_answers_across() -> None:
    answers = ClassAnswers.of("abc", np.array([A, A, B, C]), logits(A, B, B, A))
    assert answers.confusion == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_churn_is_the_share_of_answers_that_differ() -> None:
    assert churn(np.array([A, B, C, C]), np.array([A, B, B, A])) == 0.5
    assert churn(np.array([[1, 0], [1, 1]]), np.array([[1, 0], [0, 1]])) == 0.5


def test_calibration_error_by_hand() -> None:
    # (0, 0.5]: confidence 0.4 and 0.5, one right: |1 − 0.9| ; (0.5, 1]: 0.9 and 1.0, one right: 0.9
    confidence, right = np.array([0.4, 0.5, 0.9, 1.0]), np.array([True, False, True, False])
    assert calibration_error(confidence, right, bins=2) == pytest.approx((0.1 + 0.9) / 4)


def test_calibration_error_against_a_plain_loop() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.uniform(size=500)
    right = generator.uniform(size=500) < confidence**2
    expected = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(confidence, right) == pytest.approx(expected)


def test_answers_of_two_models_by_hand() -> None:
    truth = np.array([A, A, A, A, B, B])
    answers = ClassAnswers.of("abc", truth, logits(A, A, B, C, B, A), logits(A, B, A, C, B, B))
    assert answers.right == ((1, 1, 1, 1), (1, 1, 0, 0), (0, 0, 0, 0))
    assert answers.confusion == [[2, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert answers.teacher_confusion == [[2, 1, 1], [0, 2, 0], [0, 0, 0]]
    assert answers.churn == pytest.approx(3 / 6)
    # All answers are as sure, exp(4) / (exp(4) + 2), and 3 of 6 are right, of the teacher 4.
    sure = np.exp(4) / (np.exp(4) + 2)
    assert answers.ece == pytest.approx(sure - 3 / 6)
    assert answers.teacher_ece == pytest.approx(sure - 4 / 6)
    lines = answers.lines()
    assert [(x.name, x.examples, x.teacher, x.model) for x in lines] == [
        ("a", 4, 0.5, 0.5),
        ("b", 2, 1.0, 0.5),
    ]
    worst = answers.worst()
    assert worst is not None and (worst.name, worst.change) == ("b", -0.5)
    assert ClassAnswers.from_dict(answers.to_dict()) == answers


def test_without_a_teacher_there_is_nothing_to_lose() -> None:
    answers = ClassAnswers.of("abc", np.array([A, B]), logits(A, C))
    assert (answers.churn, answers.teacher_ece, answers.worst()) == (None, None, None)
    assert answers.hidden() == []
    assert [line.model for line in answers.lines()] == [1.0, 0.0]


def test_examples_of_several_classes_count_in_each() -> None:
    truth = np.array([[1, 1], [0, 1]])
    said, taught = np.array([[3.0, -3.0], [3.0, 3.0]]), np.array([[3.0, 3.0], [-3.0, 3.0]])
    answers = ClassAnswers.of(("x", "y"), truth, said, taught)
    assert answers.right == ((1, 0, 0, 0), (1, 1, 0, 0))
    assert (answers.churn, answers.confusion) == (1.0, None)
    # Each of the four decisions is as sure; two of the model's are right, all of the teacher's.
    sure = 1 / (1 + np.exp(-3))
    assert answers.ece == pytest.approx(sure - 0.5)
    assert answers.teacher_ece == pytest.approx(1 - sure)


def test_a_class_that_collapsed_behind_a_good_average_is_told() -> None:
    truth = np.array([A] * 180 + [B] * 20)
    said = logits(*[A] * 180, *[A] * 20)
    taught = logits(*[A] * 170, *[B] * 10, *[B] * 20)
    answers = ClassAnswers.of("abc", truth, said, taught)
    (told,) = answers.hidden()
    assert told.startswith("class b: 0.0% of its 20 examples are right, of the teacher 100.0%")
    assert "nothing is taken for it any more" in told
    assert "5.0% are lost" in told  # 20 lost, 10 won, of 200


def test_a_loss_that_chance_explains_or_that_all_share_is_not_told() -> None:
    few = ClassAnswers.of(
        "abc", np.array([A] * 97 + [B] * 3), logits(*[A] * 100), logits(*[A] * 97, B, B, B)
    )
    assert few.hidden() == []  # 3 lost of 3, less than two standard errors, 2 √3
    shared = ClassAnswers.of("abc", np.array([A, B] * 50), logits(*[C] * 100), logits(*[A, B] * 50))
    assert shared.hidden() == []


def test_pooled_answers_add_up() -> None:
    truth = np.array([A, B])
    one = ClassAnswers.of("abc", truth, logits(A, B), logits(A, B))
    other = ClassAnswers.of("abc", truth, logits(B, B), logits(A, B))
    both = ClassAnswers.pooled([one, other])
    assert both.examples == 4
    assert both.right == ((1, 1, 0, 0), (2, 0, 0, 0), (0, 0, 0, 0))
    assert both.confusion == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert both.churn == pytest.approx(0.25)
    with pytest.raises(ValueError, match="other classes"):
        ClassAnswers.pooled([one, ClassAnswers.of("xyz", truth, logits(A, B))])
