"""The examples of a task, prepared for one model, and evaluation on them."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from accelerate import PartialState
from rich.progress import track
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.utils import logging

from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.outputs import label_names
from hfslim.distillation.teacher.adapted import base_source
from hfslim.distillation.teacher.teacher import accepted_inputs, split_revision
from hfslim.measuring.class_answers import ClassAnswers
from hfslim.measuring.timing import evaluating, placed
from hfslim.pipeline.opening import explained
from hfslim.tasks import (
    TASKS,
    DataConfig,
    Examples,
    Labels,
    Task,
    build_model,
    compute_metrics,
    load_model,
)
from hfslim.tasks.label_check import CLEAR, fit_of
from hfslim.tasks.metrics import decide, usual_metric
from hfslim.tasks.pairing import same_processing
from hfslim.training.checkpoint import SlimTrainer
from hfslim.training.parallel import whole

logger = logging.get_logger(__name__)


class Predictions(NamedTuple):
    """The predictions of a model on the evaluation examples.

    Attributes:
        value: The metric.
        logits: `[examples, classes]`.
        decided: Class names `[examples]`, 0/1 vectors `[examples, classes]` in the order of the
            data's labels, or values `[examples]`.
    """

    value: float
    logits: np.ndarray
    decided: np.ndarray

    def agreement(self, other: Predictions) -> float:
        """Return the fraction of examples for which two models predict the same class names."""
        same = self.decided == other.decided
        return float(same.reshape(len(same), -1).all(1).mean())


class Evaluation(NamedTuple):
    """The evaluation of a model on the evaluation examples.

    Attributes:
        metrics: The metric and the loss, by their names.
        logits: `[examples, classes]`, in the order of the examples and of the data's labels.
    """

    metrics: dict[str, float]
    logits: np.ndarray


@dataclass
class TaskExamples:
    """Examples and processor of a task, prepared for one model.

    Attributes:
        task: Text, image or audio classification.
        data: Where the examples come from.
        metric: A key of `METRICS`.
        seed: Seed of every draw.
        evaluation: Arguments of evaluations outside training.
        examples: Checked examples, labels in the model's order.
        processor: Tokenizer, image processor or feature extractor.
        train: Training examples, processed for the Trainer.
        eval: Evaluation examples, processed for the Trainer.
    """

    task: Task
    data: DataConfig
    metric: str
    seed: int
    evaluation: TrainingArguments
    examples: Examples
    processor: Any
    train: Any
    eval: Any

    @classmethod
    def prepare(
        cls,
        task: str,
        data: DataConfig,
        metric: str | None,
        seed: int,
        evaluation: TrainingArguments,
        model: str | None,
        model_config: Mapping[str, Any] | None = None,
        processor: str | None = None,
        new_head: bool = False,
        **rest: Any,
    ) -> Self:
        """Load data and processor, and check them against the model and the metric.

        Args:
            task: A key of `TASKS`.
            data: Where the examples come from.
            metric: A key of `METRICS`; by default the usual one for the labels.
            seed: Seed of every draw.
            evaluation: Arguments of evaluations outside training.
            model: Hub id or folder of the model.
            model_config: `model_type` and fields of an untrained model, instead of `model`.
            processor: Hub id or folder of the processor; by default the model's own.
            new_head: Whether the model may get a new head, because it is trained first.
            rest: Attributes of a subclass.

        Raises:
            RecipeError: The data, the model or the processor cannot be read.
            ValueError: The data do not fit the model or the metric, or the model's own answers
                show that its outputs are paired with the wrong labels.
        """
        kind = TASKS[task]
        with explained("data"):
            examples = kind.load_examples(data, seed)
        fault = None
        if model is not None:
            with explained(f"model {model!r}"):
                config = AutoConfig.from_pretrained(model)
            try:
                examples = examples.paired(label_names(config), data.label_names)
            except ValueError as error:
                fault = f"{model}: {error}"
            found, labels = examples.found, examples.labels
            same = (labels.problem, len(labels.names)) == (found.problem, len(found.names))
            if new_head and (fault or not same or labels.by in ("id", "position")):
                fault, examples = None, _for_new_head(examples, data)
        else:
            examples = _for_new_head(examples, data)
            config = build_model(kind, model_config or {}, examples.labels).config
        if fault and not _could_fit(examples.found, config):
            raise ValueError(f"{fault}: {_advice(examples.found)}")
        if fault:
            examples = replace(examples, labels=_by_position(examples.found))
        metric = metric or usual_metric(examples.labels.problem)
        compute_metrics(metric, examples.labels.problem, len(examples.labels.names))
        source = processor or model
        with explained(f"processor {source!r}"):
            loaded = kind.load_processor(source, config)
            kind.check_model(config, data)
        train, held = (
            kind.prepare(part, examples, data, loaded)
            for part in (examples.train, examples.evaluation)
        )
        made = cls(kind, data, metric, seed, evaluation, examples, loaded, train, held, **rest)
        if model is not None and not new_head and examples.labels.problem != "regression":
            made.check_pairing(made.load_model(model), fault)
        return made

    def check_pairing(self, model: Any, fault: str | None = None) -> None:
        """Check by a model's own answers that its outputs are paired with the right labels.

        A pairing by position must be confirmed: labels and outputs share no name. Any other is
        refused where the answers contradict it.

        Args:
            model: The model.
            fault: Why names do not pair; then only the order that would fit is looked for.

        Raises:
            ValueError: The pairing is refused, with the `label_names` that would fit.
        """
        labels = self.examples.labels
        by_name = labels.by in ("name", "given")
        size = min(len(self.eval), 64 if by_name else 256)
        part = self.eval.shuffle(seed=self.seed).select(range(size))
        logits, references = self._answers_to(model, part)
        fit = fit_of(logits, references, labels.problem)
        measure = "balanced accuracy" if labels.problem.startswith("single") else "correlation"
        found = f"{measure} {fit.score:.3f} on {size} examples"
        if fault is None:
            better = fit.gain > CLEAR and not by_name
            if fit.skill > (CLEAR if labels.by == "position" else -CLEAR) and not better:
                return
            fault = (
                f"the model's outputs, paired by {labels.by} with the data's labels "
                f"{list(labels.in_data)}, have a {found}, which "
                + ("does not confirm it" if fit.skill > -CLEAR else "is below chance")
            )
        raise ValueError(f"{fault}: {_advice(self.examples.found, labels.in_data, fit.best)}")

    def load_model(self, source: str, new_head: bool = False) -> PreTrainedModel:
        """Load a model for the labels of the data."""
        return load_model(self.task, source, self.examples.labels, new_head, self.processor)

    @property
    def stated_length(self) -> int | None:
        """The length of the input whose costs are reported; None if the model fixes it."""
        return self.task.stated_length(self.data, self.processor)

    def inputs(
        self, model: PreTrainedModel, batch_size: int = 1, length: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the input for which the costs of a model are reported."""
        return example_inputs(model, batch_size, length=length or self.stated_length)

    @property
    def compute_metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        """The Trainer's `compute_metrics`, for labels in the model's order."""
        return _metrics_of(self.metric, self.examples.labels)

    @property
    def stated_data(self) -> str:
        """The evaluation examples as reports name them, with the positive class of `f1_binary`."""
        labels = self.examples.labels
        end = ""
        if self.metric == "f1_binary":
            end = f", positive: {labels.names[labels.positive]}"
        return f"evaluation, {len(self.eval):,} examples{end}"

    def trainer_parts(self) -> dict[str, Any]:
        """Return the keyword arguments of a Trainer on these examples."""
        return {
            "train_dataset": self.train,
            "eval_dataset": self.eval,
            "data_collator": self.task.collator(self.processor),
            "processing_class": self.processor,
            "compute_metrics": self.compute_metrics,
        }

    def taught_parts(self, teachers: Sequence[str]) -> dict[str, Any]:
        """Return the keyword arguments of a Trainer with these teachers.

        Args:
            teachers: Hub ids or folders. A teacher without a processor, or with an equivalent one,
                takes the model's inputs; for the others the examples are processed once more.
        """
        own = [self.own_processor(teacher) for teacher in teachers]
        parts = {**self.trainer_parts(), "teacher": list(teachers), "teacher_processor": own}
        if any(processor is not None for processor in own):
            for name, part in (
                ("train_dataset", self.examples.train),
                ("eval_dataset", self.examples.evaluation),
            ):
                parts[name] = self.task.prepare(part, self.examples, self.data, self.processor, own)
            parts["data_collator"] = self.task.collator(self.processor, own)
        return parts

    def own_processor(self, teacher: str) -> Any:
        """Return a teacher's processor; None if it has none or an equivalent of the model's."""
        own = split_revision(teacher)
        processor = None
        for source, revision in dict.fromkeys([base_source(*own), own]):
            with suppress(OSError, ValueError):
                processor = self.task.load_processor(source, PreTrainedConfig(), revision)
        if processor is None:
            logger.info("teacher %s has no processor: it reads the model's inputs", teacher)
            return None
        if same_processing(self.processor, processor):
            return None
        logger.info("teacher %s reads each example by its own processor", teacher)
        return processor

    def examples_of(self, config: PreTrainedConfig) -> Examples:
        """Return the examples with labels in the order of another model's outputs.

        Raises:
            ValueError: The labels do not fit its outputs.
        """
        names = label_names(config)
        return self.examples if names == self.examples.labels.names else self.examples.paired(names)

    def evaluate(self, model: PreTrainedModel, processor: Any = None) -> Evaluation:
        """Evaluate a model on the evaluation examples; every process calls this.

        Args:
            model: The model. Its labels may have other names and another order than the data's.
            processor: The model's processor, if the examples are not processed by an equivalent.
        """
        parts = self.trainer_parts()
        examples = self.examples_of(model.config)
        order = [examples.labels.in_data.index(one) for one in self.examples.labels.in_data]
        parts["compute_metrics"] = _metrics_of(self.metric, examples.labels)
        if processor is not None or order != sorted(order):
            own = processor or self.processor
            parts["eval_dataset"] = self.task.prepare(examples.evaluation, examples, self.data, own)
            parts |= {"data_collator": self.task.collator(own), "processing_class": own}
        # Grouped by length, the examples would be in another order each time.
        with whole(self.evaluation) as given:
            arguments = copy.copy(given)
            arguments.train_sampling_strategy = "sequential"
            trainer = SlimTrainer(model=model, args=arguments, **parts)
            output = trainer.predict(parts["eval_dataset"], metric_key_prefix="eval")
        logits: Any = output.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        figures = output.metrics or {}
        metrics = {name: figures[f"eval_{name}"] for name in (self.metric, "loss")}
        return Evaluation(metrics, np.asarray(logits).reshape(len(logits), -1)[:, order])

    def classes(self) -> np.ndarray:
        """Return the right classes of the evaluation examples, integers."""
        column = self.examples.evaluation[self.examples.columns[-1]]
        return np.asarray(self.examples.labels.encode(column)).astype(np.int64)

    def answers(self, model: Evaluation, teacher: Evaluation | None = None) -> ClassAnswers | None:
        """Return the answers of a model and its teacher class by class; None for regression."""
        labels = self.examples.labels
        if labels.problem == "regression":
            return None
        theirs = None if teacher is None else teacher.logits
        return ClassAnswers.of(labels.names, self.classes(), model.logits, theirs)

    def predict(self, model: Any, progress: bool = False) -> Predictions:
        """Return the predictions of a model on the evaluation examples, in their order.

        Args:
            model: The model, which is moved to the device of evaluations, or another callable that
                takes the same keyword arguments and returns `logits`.
            progress: Whether to show a progress bar.
        """
        labels = self.examples.labels
        scores, references = self._answers_to(model, self.eval, progress)
        measured = self.compute_metrics(EvalPrediction(predictions=scores, label_ids=references))
        decided = decide(scores, labels.problem)
        if labels.problem == "single_label_classification":
            decided = np.asarray(labels.in_data)[decided]
        elif labels.problem == "multi_label_classification":
            decided = decided[:, np.argsort(labels.in_data)]
        return Predictions(measured[self.metric], scores, decided)

    def _answers_to(
        self, model: Any, examples: Any, progress: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the logits, `[examples, classes]`, and the labels of prepared examples."""
        logits, references = [], []
        batches = self.batches(examples, self.evaluation.per_device_eval_batch_size)
        with self._running(model) as run:
            for batch in track(batches, "predicting", disable=not progress, transient=True):
                references.append(batch.pop("labels"))
                logits.append(run(batch).logits.float().cpu())
        return torch.cat(logits).numpy(), torch.cat(references).numpy()

    @contextmanager
    def _running(self, model: Any) -> Iterator[Callable[[dict[str, Any]], Any]]:
        if not isinstance(model, PreTrainedModel):
            yield lambda batch: model(**batch)
            return
        torch.nn.Module.to(model, self.evaluation.device)
        accepted = accepted_inputs(model)
        with evaluating(model):
            yield lambda batch: model(
                **placed(model, {key: value for key, value in batch.items() if key in accepted})
            )

    def batches(self, examples: Any, size: int) -> DataLoader[Any]:
        """Return a loader of collated batches of examples."""
        collator = self.task.collator(self.processor)
        return DataLoader(examples, batch_size=size, collate_fn=collator)

    def calibration(self, model: PreTrainedModel, size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield this process's share of the calibration batches, of at most `size` examples."""
        process = PartialState()
        chosen = self.train.shuffle(seed=self.seed)
        chosen = chosen.select(range(min(size, len(chosen))))
        # Not every forward takes labels, and the scores need them.
        accepted = accepted_inputs(model) | {"labels"}
        share = chosen.shard(process.num_processes, process.process_index)
        for batch in self.batches(share, self.evaluation.per_device_train_batch_size):
            yield {key: value for key, value in batch.items() if key in accepted}


def _metrics_of(metric: str, labels: Labels) -> Callable[[EvalPrediction], dict[str, float]]:
    return compute_metrics(metric, labels.problem, len(labels.names), labels.positive)


def _for_new_head(examples: Examples, data: DataConfig) -> Examples:
    """Return the examples for a head of their own labels, in the order that the user gives."""
    order = tuple(map(str, data.label_names or examples.found.names))
    return replace(examples, labels=examples.found.paired(order, data.label_names))


def _by_position(labels: Labels) -> Labels:
    return replace(labels, by="position")


def _could_fit(labels: Labels, config: PreTrainedConfig) -> bool:
    """Return whether some order of the labels could be that of the outputs."""
    return labels.problem != "regression" and len(labels.names) == config.num_labels


def _advice(labels: Labels, in_data: Sequence[str] = (), best: Sequence[int] | None = None) -> str:
    """Return how to set the order of the labels, with the one that fits if it is known."""
    if labels.problem == "regression":
        return "begin with a `transfer` stage, which trains a new head"
    names = ["?"] * len(in_data)
    for label, output in zip(in_data, best or (), strict=False):
        names[output] = label
    fits = f"; label_names: {json.dumps(names)} fits" if best else ""
    return (
        f"set label_names in data to the data's labels {list(labels.names)} in the order of the "
        f"model's outputs{fits}; or begin with a `transfer` stage, which trains a new head"
    )


def uses_cpu() -> bool:
    """Return whether Trainers run on the CPU: on request, or because there is no accelerator.

    Without `use_cpu` the Trainer starts no process group on a machine that has no accelerator.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return asked or not torch.accelerator.is_available()
