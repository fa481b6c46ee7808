"""The teachers of a student and the weighted mean of their logits."""

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

from hfslim.distillation.config import DistillationConfig
from hfslim.distillation.teacher.labels import align_labels
from hfslim.distillation.teacher.teacher import accepted_inputs, load_teacher, run_teacher
from hfslim.distillation.teacher.teacher_inputs import check_inputs
from hfslim.distillation.teacher.weights import fingerprint, shard_teacher, storage_of
from hfslim.tasks.padding import check_padding
from hfslim.tasks.pairing import PREFIX, own_inputs, prefixes, settings_of
from hfslim.training.objective import ProblemType, problem_type

__all__ = ["Source", "Teachers", "mean_logits"]

logger = logging.get_logger(__name__)

Source = PreTrainedModel | str | PathLike[str]


class Teachers:
    """Runs one teacher, or several and averages their outputs.

    Args:
        given: Models, Hub ids or folders.
        processors: For each teacher its own tokenizer, image processor or feature extractor, or
            None if it reads the student's inputs.
        student: The student.
        student_processor: The processor of the student's inputs, if it is known.
        args: Settings of the training.

    Attributes:
        models: The teachers, frozen.
        orders: The results of `align_labels`.
        prefixes: The prefixes of each teacher's inputs in a batch; "" for the student's inputs.
        names: The Hub ids, folders or class names of the teachers.

    Raises:
        ValueError: A teacher's labels are not the student's, a teacher would read inputs that were
            made for another model, or the number of weights or processors is wrong.
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
        sizes = (args.per_device_train_batch_size, args.per_device_eval_batch_size)
        for name, model, own in zip(self.names, self.models, processors, strict=True):
            reads = own or student_processor or student.config.get_text_config()
            check_padding(model, reads, max(sizes), f"the teacher {name},")
        kinds = {one.config.problem_type for one in self.models} - {None}
        if len(kinds) > 1:
            raise ValueError(
                f"the teachers' config.problem_type are {sorted(kinds)}; they must agree, so that "
                "their outputs can be averaged."
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
        """Names of the inputs that only teachers read."""
        names: set[str] = set()
        for model, prefix in zip(self.models, self.prefixes, strict=True):
            names |= {f"{prefix}{name}" for name in accepted_inputs(model)}
        return names - self._student_reads

    def of_student(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch without the inputs that only teachers read."""
        columns = self.columns
        return {k: v for k, v in batch.items() if k not in columns and not k.startswith(PREFIX)}

    def place(self, device: torch.device, shard: bool = False) -> None:
        """Move the teachers that are not on the device, or shard those that can be sharded."""
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
        """Return their weighted mean, `[batch, classes]` float32 in the student's order."""
        logits = self.each(batch, **options)
        if len(logits) == 1:
            return logits[0]
        problem = problem_type(self._student.config, batch.get("labels"))
        return mean_logits(logits, self.weights, self.mean, problem)

    def same_positions(self) -> bool:
        """Return whether the first teacher's positions can be those of the student."""
        rates = [
            getattr(p, "sampling_rate", None) for p in (self._student_processor, *self.processors)
        ]
        return self.models[0].main_input_name != "input_ids" and len(set(rates)) == 1

    def fingerprint(self) -> str:
        """Hash weights, label orders, processors and weighting: all but the examples."""
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
        """Return why a teacher cannot be sharded; empty if it can."""
        if self._args.teacher_cache:
            return "teacher_cache runs it on one process at a time"
        if self._args.teacher_compile:
            return "it is compiled"
        if self._args.teacher_dtype == "int8" or getattr(model, "is_quantized", False):
            return "it is quantized"
        students = {storage_of(p) for p in self._student.parameters()}
        if any(storage_of(p) in students for p in model.parameters()):
            return "its weights are the student's too"
        return ""


def mean_logits(
    logits: Sequence[Tensor], weights: Sequence[float], mean: str, problem: ProblemType
) -> Tensor:
    """Compute the logits of several teachers' weighted mean.

    Args:
        logits: Logits of each teacher, `[batch, classes]`, in one order of classes.
        weights: Weights of the teachers, with the sum 1.
        mean: `probabilities` (at temperature 1) or `logits`.
        problem: The meaning of the logits; the outputs of regression are averaged directly.

    Returns:
        `[batch, classes]`.

    Examples:
        >>> one, other = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> problem = "single_label_classification"
        >>> mean_logits([one, other], [0.5, 0.5], "probabilities", problem).softmax(-1)
        tensor([[0.7000, 0.3000]])
    """
    if mean == "logits" or problem == "regression":
        return torch.stack([w * one for w, one in zip(weights, logits, strict=True)]).sum(0)
    logs = torch.tensor([math.log(weight) for weight in weights]).to(logits[0].device)

    def log_mean(log_probabilities: list[Tensor]) -> Tensor:
        return (torch.stack(log_probabilities) + logs[:, None, None]).logsumexp(0)

    if problem == "multi_label_classification":
        yes = log_mean([F.logsigmoid(one) for one in logits])
        return yes - log_mean([F.logsigmoid(-one) for one in logits])
    return log_mean([F.log_softmax(one, dim=-1) for one in logits])
