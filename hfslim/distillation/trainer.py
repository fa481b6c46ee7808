"""A Trainer whose student learns from labels and from a teacher's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import IterableDataset, Subset
from transformers import PreTrainedModel
from transformers.utils import logging

from hfslim.anatomy.adapters import base_of
from hfslim.anatomy.model_state import check_classifier
from hfslim.distillation.cache.cached_answers import CachedAnswers, cacheable
from hfslim.distillation.cache.examples import KeyedCollator, SeededExamples
from hfslim.distillation.config import DistillationConfig
from hfslim.distillation.losses.feature_training import FeatureTraining
from hfslim.distillation.losses.logit_losses import LOGIT_LOSSES, distillation_loss
from hfslim.distillation.teacher.answers import TeacherAnswers
from hfslim.distillation.teacher.teacher_quality import check_quality
from hfslim.distillation.teacher.teachers import Source, Teachers
from hfslim.tasks.pairing import PairedCollator, collator_of
from hfslim.training.batch_shares import real_examples
from hfslim.training.checkpoint import SlimTrainer
from hfslim.training.objective import ProblemType, logits_of, problem_type, with_loss
from hfslim.training.parallel import way_of

__all__ = ["DistillationTrainer"]

logger = logging.get_logger(__name__)

_EXAMPLES_TO_CHECK = 512


class DistillationTrainer(SlimTrainer):
    """Trains on `(1 - alpha) · labels' loss + alpha · logit loss + Σ weight · feature loss`.

    Every term is a mean over the examples of an optimizer step, whatever the accumulation and
    number of processes, and is logged beside the weighted sum: `loss_hard`, `loss_distillation` and
    a `loss_...` for each feature loss, with `agreement`, the share of examples for which student
    and teacher predict the same class, and `teacher_time_share`.
    Evaluation runs the student alone: `eval_loss` is the labels' loss. The teacher is moved once to
    the student's device (under FSDP2 and ZeRO-3 it is sharded over the processes), runs without
    gradients in evaluation mode, and is in no checkpoint. It reads the student's batches, or the
    same examples from its own processor. A student without `config.problem_type` gets the
    teacher's.

    Args:
        model: The student.
        args: `DistillationConfig`.
        *rest: As for `transformers.Trainer`, from `data_collator` on.
        teacher: A model, a Hub id or a folder, with the student's labels in any order; or several
            teachers, whose weighted mean is used.
        teacher_processor: Tokenizer, image processor or feature extractor of a teacher that reads
            other inputs than the student. Each example then also holds the teacher's inputs, named
            by `hfslim.distillation.teacher_inputs`. With several teachers, one for each, or None.
        **kwargs: As for `transformers.Trainer`, except `compute_loss_func`.

    Attributes:
        teachers: The teachers.
        answers: The teachers' answers, live or from the cache.
        features: The feature losses.

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
    _unchecked: list[list[Tensor]] | None = None

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
        check_classifier(base_of(self.model))
        given: Any = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
        processors = teacher_processor
        if not isinstance(processors, list | tuple):
            processors = [processors] * (len(given) if processors is None else 1)
        # Without a processing class the collator may have the tokenizer.
        student_processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        self.teachers = Teachers(given, processors, self.model, student_processor, args)
        for one in self.teachers.models:
            check_classifier(base_of(one))
        self.teachers.place(args.device, shard=way_of(args) in ("ZeRO-3", "FSDP"))
        self._take_over_problem()
        own = zip(self.teachers.prefixes, processors, strict=True)
        batchers = {prefix: collator_of(processor) for prefix, processor in own if prefix}
        if batchers and not isinstance(self.data_collator, PairedCollator):
            self.data_collator = PairedCollator(self.data_collator, batchers)
        if args.teacher_cache:
            apart = all(self.teachers.prefixes)
            self.data_collator = KeyedCollator(self.data_collator, teacher_alone=apart)
        self.answers = TeacherAnswers(self.teachers, self.accelerator)
        self.features = FeatureTraining(self)
        self.callback_handler.callbacks.insert(0, self.features)
        self._reset_logged()

    @property
    def teacher(self) -> Any:
        """The teacher, or the first of several."""
        return self.teachers.models[0]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Check the teacher on labelled data, then train as `transformers.Trainer.train`."""
        if not self.args.allow_untrained_teacher:
            self._check_teachers()
        logger.info(f"loss = {self.args.objective}")
        batches = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        across = LOGIT_LOSSES[self.args.logit_loss].across_examples
        if across and batches > 1 and self.is_world_process_zero():
            logger.warning(
                f"logit_loss={self.args.logit_loss!r} compares the examples of one batch: "
                f"{batches} batches in a step give another loss than one large batch."
            )
        return super().train(*args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Train; `model_init` may have made a new student since `__init__`.

        With `auto_find_batch_size` this begins again if a batch does not fit into memory.
        """
        self._reset_logged()
        self._take_over_problem()
        with self.features.prepared():
            if self.args.teacher_cache:
                self.train_dataset = cacheable(self.train_dataset, self.args)
                self.answers = CachedAnswers(self, self.features.terms)
            else:
                self.answers = TeacherAnswers(self.teachers, self.accelerator)
            return super()._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.train_dataset, SeededExamples):
            self.train_dataset.epoch = kwargs["epoch"]
        super()._run_epoch(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Build the optimizer of the student and of the projections of its hidden states."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self.features.add_to(optimizer)
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self.features.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self.features.load(checkpoint)

    def _take_over_problem(self) -> None:
        student: Any = self.model
        if student.config.problem_type is None:
            student.config.problem_type = self.teacher.config.problem_type

    def _check_teachers(self) -> None:
        """Check the teachers on the evaluation data, else on the training data.

        Nothing is taken from a stream, which may run only once: `get_batch_samples` checks the
        teachers on the first batches that the student is trained on.
        """
        self._unchecked = None
        found: list[Any] = []
        for data in (self.eval_dataset, self.train_dataset):
            if isinstance(data, Mapping) and not hasattr(data, "features"):
                data = next(iter(data.values()))
            found += [data] if data is not None else []
        data = next((one for one in found if not isinstance(one, IterableDataset)), None)
        if data is None:
            self._unchecked = []
            return
        if hasattr(data, "__len__") and len(data) > _EXAMPLES_TO_CHECK:
            step = len(data) / _EXAMPLES_TO_CHECK
            data = Subset(data, [int(i * step) for i in range(_EXAMPLES_TO_CHECK)])
        answers: list[list[Tensor]] = []
        for batch in self.get_test_dataloader(data):
            labels = batch.get("labels")
            if labels is None or not self._ask(
                batch, answers, real_examples(self.accelerator, len(labels))
            ):
                break
        self._check_answers(answers)

    def _ask(
        self, batch: dict[str, Any], answers: list[list[Tensor]], first: int | None = None
    ) -> bool:
        """Add each teacher's logits and the labels; return whether more examples are needed."""
        if batch.get("labels") is None:
            return False
        batch = self._prepare_inputs(batch)
        with self.accelerator.autocast():
            own = [*self.teachers.each(batch), batch["labels"]]
        # Batches may differ in size between processes.
        answers.extend(gather_object([[one[:first].cpu() for one in own]]))
        return sum(len(labels) for *_, labels in answers) < _EXAMPLES_TO_CHECK

    def _check_answers(self, answers: list[list[Tensor]]) -> None:
        if answers:
            live: Any = self.model
            *logits, target = (torch.cat(parts) for parts in zip(*answers, strict=True))
            for name, own in zip(self.teachers.names, logits, strict=True):
                check_quality(own, target, problem_type(live.config, target), name)

    def _set_signature_columns_if_needed(self) -> None:
        first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if first:
            self._signature_columns += sorted(self.teachers.columns)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | None]:
        """Fetch the batches of one optimizer step, and count the step for the logged means."""
        self.answers.clock.start()
        self._steps_logged += 1
        batches, counts = super().get_batch_samples(*args, **kwargs)
        if self._unchecked is not None:
            more = [self._ask(batch, self._unchecked) for batch in batches]
            last = self.state.global_step + 1 >= self.state.max_steps
            if last or self.accelerator.gradient_state.end_of_dataloader or not all(more):
                self._check_answers(self._unchecked)
                self._unchecked = None
        return batches, counts

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
        """Compute this process's share of the step's loss; in evaluation, of the labels' loss.

        The arguments are those of `SlimTrainer.compute_loss`.
        """
        alpha = self._scheduled("alpha")
        labels: Any = inputs.get("labels")
        if labels is None and model.training:
            self._check_unlabelled(inputs)
        terms = self.features.terms
        distils = model.training and self._progress() < 1 and (alpha > 0 or terms is not None)
        student_inputs = self.teachers.of_student(inputs)
        if not distils or (labels is None and alpha < 1):
            loss, outputs = super().compute_loss(model, student_inputs, True, num_items_in_batch)
            if model.training:
                self._record("loss_hard", loss)
            return (loss, outputs) if return_outputs else loss
        student_inputs.pop("labels", None)
        feature_losses: dict[str, Tensor] = {}
        if terms is None:
            outputs = model(**student_inputs)
            answer = self.answers.of(inputs)
        else:
            capture = terms.captures[0]
            with capture.recording() as states:
                outputs = model(**student_inputs, **capture.arguments)
            answer = self.answers.of(inputs, terms, states)
            assert answer.states is not None
            feature_losses = terms.losses(states, answer.states, student_inputs)
        logits = logits_of(outputs)
        counts, local = num_items_in_batch, num_items_in_batch is None
        examples = torch.tensor(len(logits)) if local else counts[1]
        problem = self.problem_of(labels)
        parts: dict[str, tuple[float, Tensor]] = {}
        if alpha > 0:
            losses = distillation_loss(
                logits,
                answer.logits,
                problem,
                self._scheduled("temperature"),
                self.args.logit_loss,
                labels,
                self.args.dkd_beta,
            )
            parts["loss_distillation"] = alpha, self.share(losses, examples, local)
        if alpha < 1:
            parts["loss_hard"] = 1 - alpha, self.hard_loss_share(logits, labels, counts)
        factor = self._scheduled("feature_weight", 1.0)
        for name, losses in feature_losses.items():
            weight = factor * self.features.weights[name]
            parts[f"loss_{name}"] = weight, self.share(losses, examples, local)
        loss = logits.new_zeros((), dtype=torch.float32)
        for name, (weight, part) in parts.items():
            self._record(name, part)
            loss = loss + weight * part
        if problem != "regression":
            same = _same_classes(logits, answer.logits, problem)
            self._record("agreement", self.share(same, examples, local))
        if answer.cached is not None:
            hit = torch.full_like(logits[:, 0], float(answer.cached), dtype=torch.float32)
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
        """Return the completed fraction of the distillation, 1 or more after its end."""
        steps = max(self.state.max_steps, 1) * self.args.distil_until
        return self.state.global_step / steps

    def _scheduled(self, name: str, start: float | None = None) -> float:
        """Return a setting's value in this step, interpolated linearly to its `_end`."""
        first = getattr(self.args, name) if start is None else start
        last = getattr(self.args, f"{name}_end")
        return first if last is None else first + (last - first) * min(self._progress(), 1.0)

    def _record(self, name: str, value: Tensor) -> None:
        """Add this process's share of a value in this step to what is logged next."""
        value = value.detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps_of.setdefault(name, set()).add(self._steps_logged)

    def _reset_logged(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps_of: dict[str, set[int]] = {}
        self._steps_logged = 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with each loss term's mean over all processes and its steps since the last log."""
        if "loss" in logs and self._steps_logged:
            for name, total in sorted(self._sums.items()):
                mean = self.accelerator.reduce(total, reduction="mean")
                logs[name] = mean.item() / len(self._steps_of[name])
            share = torch.tensor(self.answers.clock.take(), device=self.args.device)
            logs["teacher_time_share"] = self.accelerator.reduce(share, reduction="mean").item()
            self._reset_logged()
        super().log(logs, *args, **kwargs)


def _same_classes(student: Tensor, teacher: Tensor, problem: ProblemType) -> Tensor:
    """Return 1 for each example with the same predicted class, or set of classes, and else 0."""
    if problem == "multi_label_classification":
        return ((student > 0) == (teacher > 0)).all(-1).float()
    return (student.argmax(-1) == teacher.argmax(-1)).float()
