"""The outputs of a classifier: their names, their problem type, and how two sets of names pair."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor
from transformers import PreTrainedConfig

__all__ = ["Pairing", "ProblemType", "label_names", "numbers_of", "pair_names", "problem_type"]

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


class Pairing(NamedTuple):
    """The output that belongs to each label.

    Attributes:
        order: The index of the output of each label.
        by: What pairs them: equal `name`s, labels that are `id`s of outputs, or the bare
            `position` of labels beside outputs that have no names.
    """

    order: tuple[int, ...]
    by: Literal["name", "id", "position"]


def problem_type(config: PreTrainedConfig, labels: Tensor | None = None) -> ProblemType:
    """Return a classifier's problem type, by the rule of transformers.

    `config.problem_type` decides where it is set. Otherwise one label means regression, integer
    labels mean one class per example, and other labels a yes-or-no question per class.

    Args:
        config: The classifier's.
        labels: Labels of a batch; without them an unset type counts as single-label.

    Raises:
        ValueError: `config.problem_type` is none of the three.

    Examples:
        >>> import torch
        >>> from transformers import BertConfig
        >>> problem_type(BertConfig(num_labels=1))
        'regression'
        >>> problem_type(BertConfig(num_labels=3), torch.tensor([[1.0, 0.0, 1.0]]))
        'multi_label_classification'
    """
    declared = config.problem_type
    if declared is None:
        if config.num_labels == 1:
            return "regression"
        if labels is None or not labels.is_floating_point():
            return "single_label_classification"
        return "multi_label_classification"
    known = get_args(ProblemType)
    if declared not in known:
        raise ValueError(
            f"config.problem_type is {declared!r}; expected one of {', '.join(known)}."
        )
    return declared


def label_names(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the names of a classifier's outputs, in their order.

    The keys of `id2label` may be integers or, as in JSON, strings of integers.

    Raises:
        ValueError: The keys are not the numbers of the outputs.

    Examples:
        >>> from transformers import BertConfig
        >>> label_names(BertConfig(id2label={"1": "yes", "0": "no"}))
        ('no', 'yes')
    """
    given: Any = config.id2label or {}
    known = {str(key): str(name) for key, name in given.items()}
    wanted = [str(i) for i in range(len(known))]
    if set(wanted) != set(known):
        raise ValueError(
            f"config.id2label has the keys {list(given)}; expected the numbers of the outputs, "
            f"0 to {len(known) - 1}"
        )
    return tuple(known[key] for key in wanted)


def numbers_of(names: Sequence[str]) -> tuple[int, ...] | None:
    """Return the numbers in names such as `LABEL_2` or `2`; None if a name is another.

    Examples:
        >>> numbers_of(["LABEL_0", "LABEL_1"]), numbers_of(["no", "1"])
        ((0, 1), None)
    """
    found = [re.fullmatch(r"(?:label_)?(\d{1,9})", name.strip().casefold()) for name in names]
    return tuple(int(one[1]) for one in found if one) if all(found) else None


def pair_names(labels: Sequence[str], outputs: Sequence[str]) -> Pairing:
    """Pair labels, of data or of a student, with the outputs of a model or a teacher.

    Equal names belong together, without case and surrounding blanks; labels that are numbers are
    ids of outputs; outputs without names (`LABEL_0` or `0`) belong to as many labels by position.
    Outputs that no label names are left over.

    Raises:
        ValueError: A name occurs twice, or the names differ.

    Examples:
        >>> pair_names(["no", "yes"], ["Yes", "No"])
        Pairing(order=(1, 0), by='name')
        >>> pair_names(["0", "2"], ["negative", "neutral", "positive"])
        Pairing(order=(0, 2), by='id')
    """
    mine, theirs = ([name.strip().casefold() for name in names] for names in (labels, outputs))
    for given, names in ((labels, mine), (outputs, theirs)):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(
                f"the labels {list(given)} hold {twice[0]!r} more than once, so that they cannot "
                "be told apart"
            )
    if set(mine) <= set(theirs):
        return Pairing(tuple(theirs.index(name) for name in mine), "name")
    ids, places = numbers_of(mine), numbers_of(theirs)
    if ids is not None and places is not None and set(ids) <= set(places):
        return Pairing(tuple(places.index(number) for number in ids), "name")
    if ids is not None and places is None and max(ids) < len(theirs):
        return Pairing(ids, "id")
    if places is not None and sorted(places) == list(range(len(mine))):
        return Pairing(tuple(places.index(i) for i in range(len(mine))), "position")
    raise ValueError(f"the labels {list(labels)} are not among {list(outputs)}")
