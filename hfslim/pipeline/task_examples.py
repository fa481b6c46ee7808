"""The examples of a task, prepared for one model, and evaluation on them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
from hfslim.distillation.teacher.adapted import base_source
from hfslim.distillation.teacher.teacher import accepted_inputs, split_revision
from hfslim.measuring.class_answers import ClassAnswers
from hfslim.measuring.timing import evaluating, placed
from hfslim.pipeline.opening import explained
from hfslim.tasks import (
    TASKS,
    DataConfig,
    Examples,
    Task,
    build_model,
    compute_metrics,
    load_model,
)
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
            rest: Attributes of a subclass.

        Raises:
            RecipeError: The data, the model or the processor cannot be read.
            ValueError: The data do not fit the model or the metric.
        """
        kind = TASKS[task]
        with explained("data"):
            examples = kind.load_examples(data, seed)
        metric = metric or usual_metric(examples.labels.problem)
        compute_metrics(metric, examples.labels.problem, len(examples.labels.names))
        if model is not None:
            with explained(f"model {model!r}"):
                config = AutoConfig.from_pretrained(model)
            examples = examples.with_order_of(config.id2label)
        else:
            config = build_model(kind, model_config or {}, examples.labels).config
        source = processor or model
        with explained(f"processor {source!r}"):
            loaded = kind.load_processor(source, config)
            kind.check_model(config, data)
        train, held = (
            kind.prepare(part, examples, data, loaded)
            for part in (examples.train, examples.evaluation)
        )
        return cls(kind, data, metric, seed, evaluation, examples, loaded, train, held, **rest)

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

    def trainer_parts(self) -> dict[str, Any]:
        """Return the keyword arguments of a Trainer on these examples."""
        labels = self.examples.labels
        return {
            "train_dataset": self.train,
            "eval_dataset": self.eval,
            "data_collator": self.task.collator(self.processor),
            "processing_class": self.processor,
            "compute_metrics": compute_metrics(self.metric, labels.problem, len(labels.names)),
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

    def evaluate(self, model: PreTrainedModel, processor: Any = None) -> Evaluation:
        """Evaluate a model on the evaluation examples; every process calls this.

        Args:
            model: The model. The order of its labels may differ from that of the data.
            processor: The model's processor, if the examples are not processed by an equivalent.
        """
        parts = self.trainer_parts()
        ids: Any = model.config.id2label
        examples = self.examples.with_order_of(ids)
        order = [examples.labels.names.index(name) for name in self.examples.labels.names]
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
        logits, references = [], []
        batches = self.batches(self.eval, self.evaluation.per_device_eval_batch_size)
        with self._running(model) as run:
            for batch in track(batches, "predicting", disable=not progress, transient=True):
                references.append(batch.pop("labels"))
                logits.append(run(batch).logits.float().cpu())
        scores = torch.cat(logits).numpy()
        measured = compute_metrics(self.metric, labels.problem, len(labels.names))(
            EvalPrediction(predictions=scores, label_ids=torch.cat(references).numpy())
        )
        decided = decide(scores, labels.problem)
        if labels.problem == "single_label_classification":
            decided = np.asarray(labels.names)[decided]
        elif labels.problem == "multi_label_classification":
            decided = decided[:, np.argsort(labels.names)]
        return Predictions(measured[self.metric], scores, decided)

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


def uses_cpu() -> bool:
    """Return whether Trainers run on the CPU: on request, or because there is no accelerator.

    Without `use_cpu` the Trainer starts no process group on a machine that has no accelerator.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return asked or not torch.accelerator.is_available()
