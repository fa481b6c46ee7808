"""A Trainer whose student learns from labels and from a teacher's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from hfslim.distillation.cache.cached_training import CacheMixin
from hfslim.distillation.cache.teacher_cache import KeyedCollator
from hfslim.distillation.config import DistillationConfig
from hfslim.distillation.losses.feature_training import FeatureMixin
from hfslim.distillation.losses.logit_losses import distillation_loss
from hfslim.distillation.teacher.clock import TeacherClock
from hfslim.distillation.teacher.teacher_quality import check_skill
from hfslim.distillation.teacher.teachers import Source, Teachers
from hfslim.tasks.pairing import PairedCollator, collator_of
from hfslim.training.checkpoint import CheckpointMixin
from hfslim.training.hub_pushes import HubMixin
from hfslim.training.log_figures import FiguresMixin
from hfslim.training.objective import MeanLossMixin, ProblemType, logits_of, problem_type, with_loss
from hfslim.training.parallel import way_of

__all__ = ["DistillationTrainer"]

logger = logging.get_logger(__name__)

_EXAMPLES_TO_CHECK = 512


class DistillationTrainer(
    FeatureMixin, CacheMixin, CheckpointMixin, HubMixin, FiguresMixin, MeanLossMixin, Trainer
):
    """Trains on `(1 - alpha) · labels' loss + alpha · logit loss + Σ weight · feature loss`.

    All are means over the examples of an optimizer step, whatever the accumulation and number of
    processes, and are logged beside their weighted sum: `loss_hard`, `loss_distillation` and a
    `loss_...` for each feature loss, with `agreement`, the share of examples for which student and
    teacher give the same class, and `teacher_time_share`.
    Evaluation runs the student alone: `eval_loss` is the labels' loss. The teacher is placed once
    on the student's device (under FSDP2 and ZeRO-3 in parts, one on each process), runs without
    gradients in evaluation mode, and is in no checkpoint. It sees the student's batches, or the
    same examples as its own processor makes them. A student without `config.problem_type` takes
    over the teacher's.

    Args:
        model: The student.
        args: `DistillationConfig`.
        *rest: As for `transformers.Trainer`, from `data_collator` on.
        teacher: A model, a Hub id or a folder, with the student's labels in any order; or several,
            whose weighted mean teaches.
        teacher_processor: Tokenizer, image processor or feature extractor of a teacher that reads
            other inputs than the student. Each example then holds what that one makes of it, by the
            names of `hfslim.distillation.teacher_inputs`. With several teachers, one for each, or
            None.
        **kwargs: As for `transformers.Trainer`, except `compute_loss_func`.

    Raises:
        TypeError: If `args` is not a `DistillationConfig`.
        ValueError: If there is no teacher, or its labels do not match the student's.
        UntrainedTeacherError: If the teacher has a fresh head, or, on `train`, is at chance level
            on up to 512 labelled examples of the evaluation (else training) data.

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
    """

    args: DistillationConfig
    _signature_columns: Any

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: DistillationConfig | None = None,
        *rest: Any,
        teacher: Source | Sequence[Source] | None = None,
        teacher_processor: Any = None,
        **kwargs: Any,
    ) -> None:
        if teacher is None:
            raise ValueError(
                "DistillationTrainer has no teacher; pass teacher=<model, Hub id or folder>, or "
                "use hfslim.SlimTrainer to train on labels alone."
            )
        if not isinstance(args, DistillationConfig):
            raise TypeError(
                f"args is {type(args).__name__}; DistillationTrainer needs a DistillationConfig."
            )
        super().__init__(model, args, *rest, **kwargs)
        student: Any = self.model
        several = isinstance(teacher, list | tuple)
        given: Any = list(teacher) if several else [teacher]  # type: ignore[arg-type]
        if not isinstance(teacher_processor, list | tuple):
            teacher_processor = [teacher_processor] * (
                len(given) if teacher_processor is None else 1
            )
        # A collator tells the tokenizer where the Trainer was not given it.
        read_by = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        self.teachers = Teachers(given, teacher_processor, student, read_by, args)
        self.teachers.place(args.device, shard=way_of(args) in ("ZeRO-3", "FSDP"))
        self._take_over_problem()
        own = zip(self.teachers.prefixes, teacher_processor, strict=True)
        batchers = {prefix: collator_of(processor) for prefix, processor in own if prefix}
        if batchers and not isinstance(self.data_collator, PairedCollator):
            self.data_collator = PairedCollator(self.data_collator, batchers)
        self._forget_terms()
        if args.teacher_cache:
            apart = all(self.teachers.prefixes)
            self.data_collator = KeyedCollator(self.data_collator, teacher_alone=apart)

    @property
    def teacher(self) -> Any:
        """The teacher, or the first of several."""
        return self.teachers.models[0]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Check the teacher on labelled data, then train as `transformers.Trainer.train`."""
        self._forget_terms()
        if not self.args.allow_untrained_teacher:
            self._check_teacher()
        logger.info(f"loss = {self.args.objective}")
        parts = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        if self.args.logit_loss == "dist" and parts > 1 and self.is_world_process_zero():
            logger.warning(
                f"logit_loss='dist' correlates the examples of one batch: {parts} batches a step "
                "are not what one large batch would be."
            )
        return super().train(*args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Train the student that `model_init` may have made anew by now."""
        self._take_over_problem()
        with self.feature_training():
            if self.args.teacher_cache:
                self._open_cache(self.args.teacher_cache)
            self._clock = TeacherClock(self.args.device)
            return super()._inner_training_loop(*args, **kwargs)

    def _take_over_problem(self) -> None:
        student: Any = self.model
        if student.config.problem_type is None:
            student.config.problem_type = self.teacher.config.problem_type

    def _check_teacher(self) -> None:
        data: Any = self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        if isinstance(data, Mapping) and not hasattr(data, "features"):
            data = next(iter(data.values()))
        if data is None:
            return
        if hasattr(data, "__len__") and len(data) > _EXAMPLES_TO_CHECK:
            step = len(data) / _EXAMPLES_TO_CHECK
            data = Subset(data, [int(i * step) for i in range(_EXAMPLES_TO_CHECK)])
        logits, labels, seen = [], [], 0
        for batch in self.get_test_dataloader(data):
            if batch.get("labels") is None:
                return
            batch = self._prepare_inputs(batch)
            with self.accelerator.autocast():
                answers = self.teachers.each(batch)
            *answers, known = self.accelerator.gather_for_metrics([*answers, batch["labels"]])
            logits.append(answers)
            labels.append(known)
            seen += len(known)
            if seen >= _EXAMPLES_TO_CHECK:
                break
        if seen:
            live: Any = self.model
            target = torch.cat(labels)
            for name, parts in zip(self.teachers.names, zip(*logits, strict=True), strict=True):
                check_skill(torch.cat(parts), target, problem_type(live.config, target), name)

    def _set_signature_columns_if_needed(self) -> None:
        first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if first:
            self._signature_columns += sorted(self.teachers.columns)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | None]:
        """Fetch the batches of one optimizer step, and count the step for the logged means."""
        self._clock.start()
        self._term_steps += 1
        return super().get_batch_samples(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Predict with the student alone, as `transformers.Trainer.prediction_step`."""
        return super().prediction_step(model, self.teachers.of_student(inputs), *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute this process's share of the step's loss; in evaluation, of the labels' alone.

        Args:
            model: The student as wrapped for training.
            inputs: A batch.
            return_outputs: Whether to return the student's outputs too.
            num_items_in_batch: Counts of `get_batch_samples`; None for the mean of this batch.

        Returns:
            The loss, or the loss and the outputs.
        """
        alpha = self._scheduled("alpha")
        labels: Any = inputs.get("labels")
        if labels is None and model.training:
            self._check_unlabelled(inputs)
        teaches = model.training and self._progress() < 1 and (alpha > 0 or self.features)
        if not teaches or (labels is None and alpha < 1):
            loss, outputs = super().compute_loss(
                model, self.teachers.of_student(inputs), True, num_items_in_batch
            )
            if model.training:
                self._record("loss_hard", loss)
            return (loss, outputs) if return_outputs else loss
        student_inputs = self.teachers.of_student(inputs)
        student_inputs.pop("labels", None)
        outputs, taught, features = self._run_both(model, student_inputs, inputs)
        logits = logits_of(outputs)
        counts = num_items_in_batch
        examples = torch.tensor(len(logits)) if counts is None else counts[1]
        local = counts is None
        loss = logits.new_zeros((), dtype=torch.float32)
        problem = self.problem_of(labels)
        if alpha > 0:
            self._check_top_k(labels)
            losses = distillation_loss(
                logits,
                taught,
                problem,
                self._scheduled("temperature"),
                self.args.logit_loss,  # type: ignore[arg-type]
                labels,
                self.args.dkd_beta,
            )
            distilled = self.share(losses, examples, local)
            self._record("loss_distillation", distilled)
            loss = loss + alpha * distilled
        if alpha < 1:
            hard = self.hard_loss_share(logits, labels, counts)
            self._record("loss_hard", hard)
            loss = loss + (1 - alpha) * hard
        factor = self._scheduled("feature_weight", 1.0)
        for name, losses in features.items():
            part = self.share(losses, examples, local)
            self._record(f"loss_{name}", part)
            loss = loss + factor * self.feature_weights[name] * part
        if problem != "regression":
            same = _same_answers(logits, taught, problem)
            self._record("agreement", self.share(same, examples, local))
        if self._cache is not None:
            hit = torch.full_like(logits[:, 0], float(self._from_cache), dtype=torch.float32)
            self._record("teacher_cache_hits", self.share(hit, examples, local))
        return (loss, with_loss(outputs, loss)) if return_outputs else loss

    def _check_unlabelled(self, inputs: dict[str, Any]) -> None:
        names = ("alpha", "alpha_end", "distil_until")
        given = {n: v for n in names if (v := getattr(self.args, n)) is not None and v < 1}
        if given:
            raise ValueError(
                f"The batch has no 'labels', only {', '.join(sorted(inputs))}, and "
                f"{', '.join(f'{n}={v:g}' for n, v in given.items())} trains on them: name the "
                "label column 'label' or 'labels', or set alpha=1 and leave the others out."
            )

    def _progress(self) -> float:
        """Return how far distillation is, from 0 to 1 or more once it is over."""
        steps = max(self.state.max_steps, 1) * self.args.distil_until
        return self.state.global_step / steps

    def _scheduled(self, name: str, start: float | None = None) -> float:
        """Return the value of a setting in this step, on the line to its `_end`."""
        first = getattr(self.args, name) if start is None else start
        last = getattr(self.args, f"{name}_end")
        return first if last is None else first + (last - first) * min(self._progress(), 1.0)

    def _record(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self._terms[name] = self._terms[name] + value if name in self._terms else value
        self._steps_of.setdefault(name, set()).add(self._term_steps)

    def _forget_terms(self) -> None:
        self._terms: dict[str, Tensor] = {}
        self._steps_of: dict[str, set[int]] = {}
        self._term_steps = 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, adding each loss term's mean over its steps since the last log and all processes."""
        if "loss" in logs and self._term_steps:
            for name, total in sorted(self._terms.items()):
                mean = self.accelerator.reduce(total, reduction="mean")
                logs[name] = mean.item() / len(self._steps_of[name])
            share = torch.tensor(self._clock.take(), device=self.args.device)
            logs["teacher_time_share"] = self.accelerator.reduce(share, reduction="mean").item()
            self._forget_terms()
        super().log(logs, *args, **kwargs)


def _same_answers(student: Tensor, teacher: Tensor, problem: ProblemType) -> Tensor:
    """Return 1 for each example of which both say the same class, or the same set of classes."""
    if problem == "multi_label_classification":
        return ((student > 0) == (teacher > 0)).all(-1).float()
    return (student.argmax(-1) == teacher.argmax(-1)).float()
