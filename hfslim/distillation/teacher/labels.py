"""Align the labels of a teacher with those of its student."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import logging

from hfslim.anatomy.outputs import label_names, pair_names

__all__ = ["align_labels"]

logger = logging.get_logger(__name__)


def align_labels(
    student: PreTrainedConfig, teacher: PreTrainedConfig, allow_subset: bool = False
) -> Tensor | None:
    """Return the teacher's index of each of the student's labels.

    They pair by name, number or position, as in `hfslim.anatomy.outputs.pair_names`. Models
    with one output are regression models, without labels to align.

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
    own, theirs = label_names(student), label_names(teacher)
    fault = f"The labels of teacher and student do not match. Student: {list(own)}. Teacher: "
    fault += f"{list(theirs)}."
    try:
        places, by = pair_names(own, theirs)
    except ValueError as error:
        raise ValueError(
            f"{fault} Give both the same names in config.id2label, in the order in which each was "
            f"trained: {error}."
        ) from error
    if len(theirs) > len(own) and not allow_subset:
        raise ValueError(
            f"{fault} Set teacher_subset=True to leave out the labels that the student lacks."
        )
    if by != "name":
        logger.warning(
            f"The teacher's labels {list(theirs)} are taken by {by} for the student's {list(own)}; "
            "the check of the teacher on labelled examples confirms it."
        )
    if places == tuple(range(len(theirs))):
        return None
    order = torch.tensor(places)
    logger.info(f"The teacher's labels are reordered to the student's: {order.tolist()}.")
    return order
