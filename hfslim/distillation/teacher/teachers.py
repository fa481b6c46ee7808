"""The teachers of a student: what each reads of a batch, and their one answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from hfslim.distillation.cache.teacher_cache import fingerprint
from hfslim.distillation.config import DistillationConfig
from hfslim.distillation.teacher.labels import align_labels
from hfslim.distillation.teacher.sharding import shard_teacher
from hfslim.distillation.teacher.teacher import (
    accepted_inputs,
    load_teacher,
    run_teacher,
    storage_of,
)
from hfslim.distillation.teacher.teacher_inputs import check_inputs
from hfslim.tasks.pairing import PREFIX, own_inputs, prefixes, settings_of
from hfslim.training.objective import ProblemType, problem_type

__all__ = ["Source", "Teachers", "mean_logits"]

logger = logging.get_logger(__name__)

Source = PreTrainedModel | str | PathLike[str]


class Teachers:
    """Asks one teacher, or several and means over their answers.

    Args:
        given: Models, Hub ids or folders.
        processors: For each, its own tokenizer, image processor or feature extractor, or None where
            it reads the student's inputs.
        student: The student.
        student_processor: What made the student's inputs, if it is known.
        args: Settings of the training.

    Attributes:
        models: The teachers, frozen.
        orders: Of `align_labels`, for each.
        prefixes: Of the batch's entries that each reads; none where it reads the student's.
        names: What each was given as.

    Raises:
        ValueError: A teacher's labels are not the student's, a teacher would read inputs that were
            made for another model, or there is not one weight or processor for each.
        UntrainedTeacherError: A teacher has a fresh head.
    """

    def __init__(
        self,
        given: Sequence[Source],
        processors: Sequence[Any],
        student: Any,
        student_processor: Any,
        args: DistillationConfig,
    ) -> None:
        for what, values in (
            ("teacher_processor", processors),
            ("teacher_weights", args.teacher_weights),
        ):
            if values is not None and len(values) != len(given):
                raise ValueError(
                    f"there are {len(given)} teachers and {len(values)} of {what}; give one for "
                    "each, in their order."
                )
        dtype = getattr(torch, args.teacher_dtype) if args.teacher_dtype else None
        self.names = [
            str(one) if isinstance(one, str | PathLike) else type(one).__name__ for one in given
        ]
        self.models: list[Any] = [
            load_teacher(one, student, args.allow_untrained_teacher, dtype) for one in given
        ]
        kinds = {one.config.problem_type for one in self.models} - {None}
        if len(kinds) > 1:
            raise ValueError(
                f"the teachers' config.problem_type are {sorted(kinds)}; they must agree, so that "
                "their answers have one mean."
            )
        self.orders = [
            align_labels(student.config, one.config, args.teacher_subset) for one in self.models
        ]
        self.prefixes = prefixes(processors)
        self.processors = [student_processor if p is None else p for p in processors]
        weights = args.teacher_weights or [1.0] * len(given)
        self.weights = [weight / sum(weights) for weight in weights]
        self.mean = args.teacher_mean
        self._args = args
        if args.teacher_compile:
            for model in self.models:
                model.compile(backend=args.teacher_compile)
        self._student, self._student_processor = student, student_processor
        self._student_reads = accepted_inputs(student)
        for source, model, own in zip(given, self.models, processors, strict=True):
            check_inputs(source, model, own, student, student_processor)
        if len(given) > 1:
            parts = " + ".join(
                f"{w:g} · {n}" for w, n in zip(self.weights, self.names, strict=True)
            )
            logger.info(f"the teachers' {self.mean} = {parts}")

    @property
    def columns(self) -> set[str]:
        """Names of what the teachers read and the student does not."""
        names: set[str] = set()
        for model, prefix in zip(self.models, self.prefixes, strict=True):
            names |= {f"{prefix}{name}" for name in accepted_inputs(model)}
        return names - self._student_reads

    def of_student(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return what of a batch is not for the teachers alone."""
        columns = self.columns
        return {k: v for k, v in batch.items() if k not in columns and not k.startswith(PREFIX)}

    def place(self, device: torch.device, shard: bool = False) -> None:
        """Move the teachers; one that is quantized may have to be where it was loaded.

        Args:
            device: Where they run.
            shard: Whether each process keeps its part of the weights only, where that can be.
        """
        for model, name in zip(self.models, self.names, strict=True):
            why = self._why_whole(model) if shard else ""
            if why:
                logger.info(f"the teacher {name} stays whole on every process: {why}")
            if shard and not why:
                shard_teacher(model, device)
            elif any(parameter.device != device for parameter in model.parameters()):
                model.to(device)

    def each(self, batch: dict[str, Any], **options: Any) -> list[Tensor]:
        """Return each teacher's logits, `[batch, classes]` float32 in the student's order."""
        return [
            run_teacher(model, own_inputs(batch, prefix) if prefix else batch, order, **options)
            for model, prefix, order in zip(self.models, self.prefixes, self.orders, strict=True)
        ]

    def logits(self, batch: dict[str, Any], **options: Any) -> Tensor:
        """Return their one answer as logits, `[batch, classes]` float32, in the student's order."""
        answers = self.each(batch, **options)
        if len(answers) == 1:
            return answers[0]
        problem = problem_type(self._student.config, batch.get("labels"))
        return mean_logits(answers, self.weights, self.mean, problem)

    def same_positions(self) -> bool:
        """Tell whether the one teacher's processor lets its positions be those of the student."""
        rates = [
            getattr(p, "sampling_rate", None) for p in (self._student_processor, *self.processors)
        ]
        return self.models[0].main_input_name != "input_ids" and len(set(rates)) == 1

    def fingerprint(self) -> str:
        """Hash all that decides their answer, but for the examples as they come to the collator."""
        parts = [
            f"{fingerprint(model, order)}{settings_of(processor)}"
            for model, order, processor in zip(
                self.models, self.orders, self.processors, strict=True
            )
        ]
        if len(parts) > 1:
            parts += [f"{self.weights}", self.mean]
        return xxhash.xxh3_128("|".join(parts).encode()).hexdigest()

    def _why_whole(self, model: Any) -> str:
        """Say why a teacher cannot be in parts, if so."""
        if self._args.teacher_cache:
            return "teacher_cache asks it on one process at a time"
        if self._args.teacher_compile:
            return "it is compiled"
        if self._args.teacher_dtype == "int8" or getattr(model, "is_quantized", False):
            return "it is quantized"
        students = {storage_of(p) for p in self._student.parameters()}
        if any(storage_of(p) in students for p in model.parameters()):
            return "its weights are the student's too"
        return ""


def mean_logits(
    answers: Sequence[Tensor], weights: Sequence[float], mean: str, problem: ProblemType
) -> Tensor:
    """Compute the logits of several teachers' weighted mean.

    Args:
        answers: Logits of each, `[batch, classes]`, in one order of classes.
        weights: Of each; their sum is 1.
        mean: Of `probabilities` (at temperature 1) or of `logits`.
        problem: What the logits mean; outputs of regression are meant as they are.

    Returns:
        `[batch, classes]`.

    Examples:
        >>> one, other = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> problem = "single_label_classification"
        >>> mean_logits([one, other], [0.5, 0.5], "probabilities", problem).softmax(-1)
        tensor([[0.7000, 0.3000]])
    """
    if mean == "logits" or problem == "regression":
        return torch.stack([w * answer for w, answer in zip(weights, answers, strict=True)]).sum(0)
    logs = torch.tensor([math.log(weight) for weight in weights]).to(answers[0].device)

    def log_mean(log_probabilities: list[Tensor]) -> Tensor:
        return (torch.stack(log_probabilities) + logs[:, None, None]).logsumexp(0)

    if problem == "multi_label_classification":
        yes = log_mean([F.logsigmoid(answer) for answer in answers])
        return yes - log_mean([F.logsigmoid(-answer) for answer in answers])
    return log_mean([F.log_softmax(answer, dim=-1) for answer in answers])
