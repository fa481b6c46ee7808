"""Load a teacher, freeze it and run it."""

from __future__ import annotations

import inspect
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from hfslim.anatomy.adapters import base_of
from hfslim.anatomy.model_state import check_head
from hfslim.distillation.teacher.adapted import find_adapter, load_adapted
from hfslim.distillation.teacher.teacher_quality import OVERRIDE, UntrainedTeacherError
from hfslim.distillation.teacher.weights import check_apart, to_int8
from hfslim.training.parallel import loading_whole

__all__ = [
    "accepted_inputs",
    "auto_class",
    "load_teacher",
    "run_teacher",
    "split_revision",
]

logger = logging.get_logger(__name__)

_AUTO_CLASSES = {
    "SEQUENCE": AutoModelForSequenceClassification,
    "IMAGE": AutoModelForImageClassification,
    "AUDIO": AutoModelForAudioClassification,
}


@loading_whole()
def load_teacher(
    teacher: PreTrainedModel | str | PathLike[str],
    student: nn.Module,
    allow_untrained: bool = False,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load a teacher for the student's task, freeze it and put it in evaluation mode.

    Each process loads all weights, also under FSDP and ZeRO-3.

    Args:
        teacher: A model, which is frozen in place; or a Hub id, optionally `id@revision`; or a
            folder. Id and folder may hold a PEFT adapter.
        student: The student, whose class determines the task. An adapter of the same frozen base
            is put on that base.
        allow_untrained: Whether a fresh head is accepted.
        dtype: Dtype of the teacher's weights; by default a model keeps its own, and a loaded one
            gets the student's. `torch.int8`: linear layers in 8 bits, the rest as by default.

    Raises:
        ValueError: The teacher is the student itself or shares its trained weights, has no weights,
            or is quantized by its own config and `dtype` is given; or the student's task is
            unknown.
        TypeError: The teacher is something else.
        FileNotFoundError: There is no such folder or Hub id.
        UntrainedTeacherError: Weights of the teacher are new, or all biases of its head are 0.
    """
    missing: list[str] = []
    if isinstance(teacher, str | PathLike):
        name = str(teacher)
        floating = dtype if dtype is not None and dtype.is_floating_point else None
        model, missing = _load(name, student, floating or computing_dtype(student))
    elif isinstance(teacher, nn.Module) and hasattr(teacher, "config"):
        name, model = type(teacher).__name__, teacher
        if teacher is student:
            raise ValueError(
                "The teacher is the student itself; pass another model, or its folder."
            )
        check_apart(name, model, student)
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(
                f"The teacher {name} was passed without its weights; pass its folder or Hub id, or "
                "set fsdp_cpu_ram_efficient_loading: false in the accelerate configuration."
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
                f"new. {OVERRIDE}"
            )
        head = _fresh_head(model)
        if head:
            raise UntrainedTeacherError(
                f"All biases of the head {head!r} of the teacher {name} are 0, as in a model that "
                f"was never trained. {OVERRIDE}"
            )
    if getattr(model, "is_quantized", False):
        if dtype is not None:
            raise ValueError(
                f"The teacher {name} is quantized by its own config, which teacher_dtype cannot "
                "change: leave teacher_dtype out."
            )
    elif dtype == torch.int8:
        model = to_int8(model.requires_grad_(False))
    elif dtype is not None and dtype != computing_dtype(model):
        model = model.to(dtype)
    return model.eval().requires_grad_(False)


def _load(name: str, student: nn.Module, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """Load a model or an adapter, and return it with the names of the weights that are new."""
    source, revision = split_revision(name)
    auto = auto_class(student)
    try:
        adapter = find_adapter(source, revision)
        if adapter is not None:
            return load_adapted(source, revision, adapter, student, auto, dtype)
        model, info = auto.from_pretrained(
            source, revision=revision, dtype=dtype, output_loading_info=True
        )
    except OSError as error:
        raise FileNotFoundError(
            f"The teacher {name!r} is no folder of a model, nor a Hub id that can be read: "
            + " ".join(str(error).split())
        ) from error
    if not info["missing_keys"]:
        check_head(*(model.config.architectures or ()))
    return model, sorted(info["missing_keys"])


def auto_class(student: nn.Module) -> Any:
    """Return the auto class of a classifier's task.

    Raises:
        ValueError: It is no sequence, image or audio classifier of transformers.
    """
    base = base_of(student)
    names = {cls.__name__ for cls in type(base).__mro__}
    for task, auto in _AUTO_CLASSES.items():
        table = getattr(modeling_auto, f"MODEL_FOR_{task}_CLASSIFICATION_MAPPING_NAMES")
        for known in table.values():
            if names & set((known,) if isinstance(known, str) else known):
                return auto
    raise ValueError(
        f"{type(base).__name__} is no sequence, image or audio classifier of transformers, so the "
        "class of its teacher is unknown; load the teacher yourself and pass the model."
    )


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


def _fresh_head(model: Any) -> str | None:
    """Return the name of the last linear layer with one output per label if its biases are 0."""
    labels = model.config.num_labels
    name, head = "", None
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == labels:
            name, head = path, module
    if head is None or head.bias is None or head.bias.is_meta or head.bias.any():
        return None
    return name


def run_teacher(
    teacher: nn.Module, inputs: dict[str, Any], order: Tensor | None, **options: Any
) -> Tensor:
    """Compute the teacher's logits, without gradients.

    Args:
        teacher: In evaluation mode.
        inputs: A batch; entries that the teacher's forward does not accept are left out.
        order: The result of `align_labels`.
        **options: Further arguments of the teacher's forward.

    Returns:
        `[batch, classes]` float32, in the student's class order.

    Raises:
        ValueError: The batch lacks the teacher's main input.
    """
    main = getattr(teacher, "main_input_name", None)
    if main is not None and main not in inputs:
        raise ValueError(
            f"The teacher {type(teacher).__name__} reads {main!r}, the batch holds "
            f"{', '.join(sorted(inputs))}; teacher and student must share tokenizer or processor."
        )
    accepted = accepted_inputs(teacher)
    dtype = computing_dtype(teacher)
    kept = {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
        if name in accepted and name != "labels"
    }
    with torch.no_grad():
        outputs = teacher(**kept, **options)
    logits = (outputs["logits"] if isinstance(outputs, dict) else outputs[0]).float()
    return logits if order is None else logits[:, order.to(logits.device)]


def computing_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's first floating-point weight, which its inputs must have."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def accepted_inputs(model: nn.Module) -> set[str]:
    """Return the names of the arguments of a model's forward, without an adapter around it."""
    return set(inspect.signature(base_of(model).forward).parameters)
