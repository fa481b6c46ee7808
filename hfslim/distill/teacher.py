"""The teacher of a distillation: loaded, frozen, checked, its labels in the student's order."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hfslim.distill.auto import auto_class, base_of
from hfslim.objective import IGNORED_LABEL, ProblemType

__all__ = [
    "UntrainedTeacherError",
    "align_labels",
    "check_skill",
    "check_vocabulary",
    "load_teacher",
    "run_teacher",
    "split_revision",
]

logger = logging.get_logger(__name__)

_OVERRIDE = "Fine-tune it first, or set allow_untrained_teacher=True."
_ENOUGH_EXAMPLES = 30


class UntrainedTeacherError(ValueError):
    """The teacher knows no more about the task than a guess."""


def load_teacher(
    teacher: PreTrainedModel | str | PathLike[str],
    student: nn.Module,
    allow_untrained: bool = False,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load a teacher for the student's task, freeze it and put it in evaluation mode.

    Args:
        teacher: A model, which is frozen in place; or a Hub id, with its revision as `id@revision`
            where that matters; or a folder.
        student: Its class tells the task.
        allow_untrained: Whether a fresh head is accepted.
        dtype: Of the teacher's weights; by default a model keeps its own, and what is loaded gets
            the student's.

    Returns:
        The teacher.

    Raises:
        ValueError: If the teacher is the student itself, or the task of the student is not known.
        TypeError: If the teacher is something else.
        FileNotFoundError: If there is no such folder or Hub id.
        UntrainedTeacherError: If weights of the teacher are new, or all biases of its head are 0.
    """
    missing: list[str] = []
    if isinstance(teacher, (str, PathLike)):
        name = str(teacher)
        source, revision = split_revision(name)
        auto = auto_class(student)
        dtype = dtype or next(student.parameters()).dtype
        try:
            model, info = auto.from_pretrained(
                source, revision=revision, dtype=dtype, output_loading_info=True
            )
        except OSError as error:
            raise FileNotFoundError(
                f"The teacher {name!r} is no folder of a model, nor a Hub id that can be read: "
                + " ".join(str(error).split())
            ) from error
        missing = sorted(info["missing_keys"])
    elif isinstance(teacher, nn.Module) and hasattr(teacher, "config"):
        name, model = type(teacher).__name__, teacher
        if teacher is student:
            raise ValueError(
                "The teacher is the student itself; pass another model, or its folder."
            )
    else:
        raise TypeError(
            f"The teacher is {type(teacher).__name__}; expected a transformers model, a Hub id or "
            "a folder."
        )
    if not allow_untrained:
        if missing:
            raise UntrainedTeacherError(
                f"The teacher {name} was saved without {', '.join(missing[:4])}, so its head is "
                f"new. {_OVERRIDE}"
            )
        head = _fresh_head(model)
        if head:
            raise UntrainedTeacherError(
                f"All biases of the head {head!r} of the teacher {name} are 0, as in a model that "
                "was never trained. " + _OVERRIDE
            )
    if dtype is not None and dtype != next(model.parameters()).dtype:
        model = model.to(dtype)
    return model.eval().requires_grad_(False)


def split_revision(name: str) -> tuple[str, str]:
    """Split `id@revision` into the id and the revision, `main` where none is given.

    A folder is returned as it is, whatever its name.

    Examples:
        >>> split_revision("user/model@v1.0")
        ('user/model', 'v1.0')
        >>> split_revision("user/model")
        ('user/model', 'main')
    """
    if Path(name).is_dir():
        return name, "main"
    source, _, revision = name.partition("@")
    return source, revision or "main"


def check_vocabulary(teacher: str, tokenizer: Any) -> None:
    """Refuse a teacher that would read the student's token ids as other tokens.

    Args:
        teacher: Hub id or folder; without a tokenizer there, nothing is known and nothing refused.
        tokenizer: The student's.

    Raises:
        ValueError: The two tokenizers give ids to other tokens.
    """
    source, revision = split_revision(teacher)
    try:
        other = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError):
        return
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours != theirs:
        differing = sorted(token for token in ours if theirs.get(token) != ours[token])
        raise ValueError(
            f"The teacher {teacher} has another vocabulary than the student: "
            f"{len(differing)} of {len(ours)} tokens have other ids there, such as "
            f"{differing[:3] or sorted(set(theirs) - set(ours))[:3]}. It would read the student's "
            "ids as other words; choose a teacher with the student's tokenizer."
        )


def _fresh_head(model: Any) -> str | None:
    """Name of the last linear layer with one output per label, if all of its biases are 0."""
    labels = model.config.num_labels
    name, head = "", None
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == labels:
            name, head = path, module
    if head is None or head.bias is None or head.bias.is_meta or head.bias.any():
        return None
    return name


def align_labels(
    student: PreTrainedConfig, teacher: PreTrainedConfig, allow_subset: bool = False
) -> Tensor | None:
    """Find where the teacher keeps each of the student's labels.

    Names are compared without regard to case and surrounding blanks. Models with one output are
    regression models and have nothing to align.

    Args:
        student: With `id2label`.
        teacher: With `id2label`.
        allow_subset: Whether the teacher may know labels that the student does not; its logits of
            those are left out, so that its probabilities are those given one of the student's.

    Returns:
        `[classes]` int64, the teacher's index of each student label, or None if the order is the
        same.

    Raises:
        ValueError: If the problem types or the sets of names differ, or a name occurs twice.

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
            "Set teacher_subset=True to leave out what the student does not know."
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


def run_teacher(
    teacher: nn.Module, inputs: dict[str, Any], order: Tensor | None, **options: Any
) -> Tensor:
    """Compute the teacher's logits, without gradients.

    Args:
        teacher: In evaluation mode.
        inputs: A batch; what the teacher's forward does not name is left out.
        order: Of `align_labels`.
        **options: Further arguments of the teacher's forward.

    Returns:
        `[batch, classes]` float32, in the student's class order.

    Raises:
        ValueError: If the batch lacks the teacher's main input.
    """
    main = getattr(teacher, "main_input_name", None)
    if main is not None and main not in inputs:
        raise ValueError(
            f"The teacher {type(teacher).__name__} reads {main!r}, the batch holds "
            f"{', '.join(sorted(inputs))}; teacher and student must share tokenizer or processor."
        )
    accepted = accepted_inputs(teacher)
    dtype = next(teacher.parameters()).dtype
    kept = {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
        if name in accepted and name != "labels"
    }
    with torch.no_grad():
        outputs = teacher(**kept, **options)
    logits = (outputs["logits"] if isinstance(outputs, dict) else outputs[0]).float()
    return logits if order is None else logits[:, order.to(logits.device)]


def accepted_inputs(model: nn.Module) -> set[str]:
    """Names of the arguments that a model's forward spells out, adapters aside."""
    return set(inspect.signature(base_of(model).forward).parameters)


def check_skill(logits: Tensor, labels: Tensor, problem: ProblemType) -> float | None:
    """Refuse a teacher whose outputs cannot be told from guesses.

    Single-label: the recall averaged over the classes that occur, of which a guess gets one share.
    Otherwise: the correlation of outputs and labels, averaged over outputs. Either must be two
    standard errors above chance.

    Args:
        logits: `[batch, classes]` of the teacher, in the order of the labels.
        labels: `[batch]`, or `[batch, classes]`.
        problem: What the logits mean.

    Returns:
        The score, or None where fewer than 30 examples or constant labels allow no verdict.

    Raises:
        UntrainedTeacherError: If the teacher is at chance level.
    """
    if problem == "single_label_classification":
        labels = labels.reshape(-1)
        known = labels != IGNORED_LABEL
        logits, labels = logits[known], labels[known]
    if len(labels) < _ENOUGH_EXAMPLES:
        logger.warning(
            f"The teacher is not checked: {len(labels)} labelled examples are too few to tell "
            f"skill from chance ({_ENOUGH_EXAMPLES} are needed)."
        )
        return None
    if problem == "single_label_classification":
        hits = (logits.argmax(dim=-1) == labels).double()
        counts = torch.bincount(labels)
        counts = counts[counts > 0].double()
        if len(counts) < 2:
            return None
        recalls = torch.stack([hits[labels == label].mean() for label in labels.unique()])
        name, score, chance = "balanced accuracy", recalls.mean().item(), 1 / len(counts)
        error = math.sqrt((chance * (1 - chance) / counts).sum().item()) / len(counts)
    else:
        target = labels.reshape(logits.shape).double()
        varied = target.std(dim=0) > 0
        if not varied.any():
            return None
        x, y = (v[:, varied] - v[:, varied].mean(dim=0) for v in (logits.double(), target))
        norms = (x.norm(dim=0) * y.norm(dim=0)).clamp(min=1e-30)
        name, score, chance = (
            "correlation with the labels",
            ((x * y).sum(0) / norms).mean().item(),
            0,
        )
        error = 1 / math.sqrt(len(target))
    if not score > chance + 2 * error:
        raise UntrainedTeacherError(
            f"The teacher's {name} on {len(labels)} examples is {score:.3f}, which is chance level "
            f"({chance:.3f} ± {2 * error:.3f}). Check that it was trained on these labels, in this "
            f"order. {_OVERRIDE}"
        )
    logger.info(f"Teacher: {name} {score:.3f} on {len(labels)} examples (chance {chance:.3f}).")
    return score
