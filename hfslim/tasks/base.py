"""The interface of text, image and audio classification."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import datasets
import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from hfslim.tasks.data import DataConfig, find_column, load_splits, sample
from hfslim.tasks.labels import Labels, find_labels
from hfslim.tasks.pairing import PairedCollator, prefixes, teacher_inputs

logger = logging.get_logger(__name__)

Batch = dict[str, list[Any]]
Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]
Reader = Callable[[Batch], dict[str, Any]]


@dataclass(frozen=True)
class Examples:
    """Raw training and evaluation examples, with their checked columns and labels.

    Attributes:
        train: Training examples, already cut to `max_train_samples`.
        evaluation: Evaluation examples, already cut to `max_eval_samples`.
        columns: The input columns, then the label column.
        found: The label space of the whole training split, in the data's order.
        labels: The label space in the order of the model's outputs.
    """

    train: datasets.Dataset
    evaluation: datasets.Dataset
    columns: tuple[str, ...]
    found: Labels
    labels: Labels

    def paired(self, outputs: Sequence[str], order: Sequence[str | int] | None = None) -> Examples:
        """Return the examples with labels in the order of a model's outputs, as `Labels.paired`."""
        return replace(self, labels=self.found.paired(outputs, order))


class Task(ABC):
    """A kind of classification: its auto class, processor, columns and collator.

    Attributes:
        name: transformers' name of the task.
        auto_model: The auto class that loads its models.
        folder_builder: The `datasets` builder that reads a folder of examples, if there is one.
        lazy: Whether examples are prepared when they are read, from columns that the Trainer must
            keep.
    """

    name: ClassVar[str]
    auto_model: ClassVar[Any]
    folder_builder: ClassVar[str | None] = None
    lazy: ClassVar[bool] = False

    @property
    def classifiers(self) -> dict[str, tuple[str, ...]]:
        """Class names of the classifiers of each model type."""
        names = self.auto_model._model_mapping._model_mapping
        return {key: (one,) if isinstance(one, str) else tuple(one) for key, one in names.items()}

    @abstractmethod
    def load_processor(
        self, source: str | None, config: PreTrainedConfig, revision: str = "main"
    ) -> Any:
        """Load the processor of a Hub id or folder, or make the one that fits `config`."""

    @abstractmethod
    def input_columns(self, dataset: datasets.Dataset, data: DataConfig) -> tuple[str, ...]:
        """Find and check the columns that hold the inputs."""

    @abstractmethod
    def reader(self, columns: tuple[str, ...], data: DataConfig, processor: Any) -> Reader:
        """Return the function that makes a model's inputs of the input columns."""

    def opened(
        self, dataset: datasets.Dataset, columns: tuple[str, ...], file: str | None
    ) -> datasets.Dataset:
        """Return the raw examples of a data file in the form that the reader takes."""
        return dataset

    def prepare(
        self,
        dataset: datasets.Dataset,
        examples: Examples,
        data: DataConfig,
        processor: Any,
        teachers: Sequence[Any] = (),
    ) -> datasets.Dataset:
        """Return raw examples as the Trainer's data: model inputs and `labels`.

        Args:
            dataset: Raw examples.
            examples: The examples that they are part of.
            data: Their source.
            processor: The model's.
            teachers: Each teacher's processor, None where it reads the model's inputs; the inputs
                of the others are added by the names of `hfslim.tasks.pairing`.
        """
        *columns, label = examples.columns
        read = self.reader(tuple(columns), data, processor)
        others = {
            prefix: self.reader(tuple(columns), data, own)
            for prefix, own in zip(prefixes(teachers), teachers, strict=True)
            if own is not None
        }

        def encode(batch: Batch) -> dict[str, Any]:
            encoded = {**read(batch), "labels": examples.labels.encode(batch[label])}
            for prefix, reader in others.items():
                encoded |= teacher_inputs(reader(batch), prefix)
            return encoded

        if self.lazy:
            return dataset.with_transform(encode, columns=[*columns, label])
        return dataset.map(
            encode, batched=True, remove_columns=dataset.column_names, desc="Processing"
        )

    @abstractmethod
    def stated_length(self, data: DataConfig, processor: Any) -> int | None:
        """Return the input length at which costs are stated; None where it is fixed."""

    @abstractmethod
    def batcher(self, processor: Any) -> Collator:
        """Return the function that makes a batch of one model's inputs, with labels if any."""

    def check_model(self, config: PreTrainedConfig, data: DataConfig) -> None:
        """Raise ValueError for a model that cannot read the data; by default all can."""
        return

    def collator(self, processor: Any, teachers: Sequence[Any] = ()) -> Collator:
        """Return the function that makes a batch of prepared examples; arguments as `prepare`."""
        own = {p: self.batcher(t) for p, t in zip(prefixes(teachers), teachers, strict=True) if p}
        batcher = self.batcher(processor)
        return PairedCollator(batcher, own) if own else batcher

    def load_examples(self, data: DataConfig, seed: int) -> Examples:
        """Load the examples and check columns and labels.

        Raises:
            ValueError: A split, column or label is missing, or a label of the evaluation split is
                not among those of the training split.
        """
        train, evaluation = load_splits(data, self.folder_builder, seed)
        inputs = self.input_columns(train, data)
        train = self.opened(train, inputs, data.train_file)
        label = find_column(train, data.label_column_name, ("label", "labels"), "label_column_name")
        labels = find_labels(train, label).with_positive(data.positive_label)
        missing = [column for column in (*inputs, label) if column not in evaluation.column_names]
        if missing:
            raise ValueError(
                f"the evaluation split has no column {missing[0]!r}, only {evaluation.column_names}"
            )
        evaluation = self.opened(evaluation, inputs, data.validation_file or data.train_file)
        train = sample(train, data.max_train_samples, seed)
        evaluation = sample(evaluation, data.max_eval_samples, seed)
        for name, part in (("training", train), ("evaluation", evaluation)):
            try:
                labels.encode(part[label])
            except ValueError as error:
                raise ValueError(f"{name} split, column {label!r}: {error}") from error
            self.check_inputs(part, inputs)
        logger.info(
            "%d training and %d evaluation examples; %s: %s",
            len(train),
            len(evaluation),
            labels.problem,
            ", ".join(labels.names),
        )
        return Examples(train, evaluation, (*inputs, label), labels, labels)

    def check_inputs(self, dataset: datasets.Dataset, columns: tuple[str, ...]) -> None:
        """Raise ValueError for inputs that cannot be used; by default there are none."""
        return


def targets(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the labels of prepared examples as a batch's, if they have any."""
    return {"labels": torch.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else {}
