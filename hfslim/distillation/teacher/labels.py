"""Align the labels of a teacher with those of its student."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import logging

__all__ = ["align_labels"]

logger = logging.get_logger(__name__)


def align_labels(
    student: PreTrainedConfig, teacher: PreTrainedConfig, allow_subset: bool = False
) -> Tensor | None:
    """Return the teacher's index of each of the student's labels.

    Names are compared without case and surrounding blanks. Models with one output are regression
    models, without labels to align.

    Args:
        student: Config with `id2label`.
        teacher: Config with `id2label`.
        allow_subset: Whether the teacher may have labels that the student lacks. Their logits are
            left out, so that probabilities are conditional on the student's labels.

    Returns:
        `[classes]` int64, or None if the order is the same.

    Raises:
        ValueError: The problem types or the sets of names differ, or a name occurs twice.

    Examples:
        >>> from transformers import BertConfig
        >>> student = BertConfig(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
        >>> teacher = BertConfig(id2label={0: "Yes", 1: "No"}, label2id={"Yes": 0, "No": 1})
        >>> align_labels(student, teacher)
        tensor([1, 0])
    """
    given, wanted = teacher.problem_type, student.problem_type
    if given and wanted and given != wanted:
        raise ValueError(
            f"The teacher's problem_type is {given!r}, the student's {wanted!r}; they must agree."
        )
    if student.num_labels == teacher.num_labels == 1:
        return None
    names = {}
    for role, config in (("student", student), ("teacher", teacher)):
        labels = _names(config)
        names[role] = [str(label).strip().casefold() for label in labels]
        twice = [label for label, count in Counter(names[role]).items() if count > 1]
        if twice:
            raise ValueError(
                f"The {role}'s labels {labels} hold {twice[0]!r} more than once, so that they "
                "cannot be told apart; make config.id2label unique."
            )
    lacking = set(names["student"]) - set(names["teacher"])
    more = set(names["teacher"]) - set(names["student"])
    if lacking or (more and not allow_subset):
        fix = (
            "Set teacher_subset=True to leave out the labels that the student lacks."
            if more and not lacking
            else "Give both the same names in config.id2label, in the order in which each was "
            "trained."
        )
        raise ValueError(
            "The labels of teacher and student do not match. Student: "
            f"{_names(student)}. Teacher: {_names(teacher)}. {fix}"
        )
    if names["student"] == names["teacher"]:
        return None
    order = torch.tensor([names["teacher"].index(label) for label in names["student"]])
    logger.info(f"The teacher's labels are reordered to the student's: {order.tolist()}.")
    return order


def _names(config: Any) -> list[str]:
    return [config.id2label[i] for i in range(config.num_labels)]
