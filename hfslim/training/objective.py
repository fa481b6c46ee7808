"""The supervised loss of a classifier, as the mean over the examples of one optimizer step.

The stock Trainer counts labels instead of examples and skips the division for gradient accumulation
for every head that accepts keyword arguments, so gradients grow with the number of accumulation
steps, processes or classes. `MeanLossMixin` weighs every example the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size

from hfslim.anatomy.adapters import base_of
from hfslim.anatomy.outputs import ProblemType, problem_type
from hfslim.tasks.padding import check_padding
from hfslim.training.batch_shares import (
    Share,
    count_stream,
    keep_first,
    real_examples,
    running,
    share_of,
)

__all__ = ["IGNORED_LABEL", "MeanLossMixin", "ProblemType", "hard_loss", "problem_type"]

IGNORED_LABEL = -100


def hard_loss(
    logits: Tensor, labels: Tensor, problem: ProblemType, label_smoothing: float = 0.0
) -> Tensor:
    """Compute the loss of each example against its label.

    Cross-entropy for one class per example, the mean over classes of the binary cross-entropy for
    several, the mean over outputs of the squared error for regression.

    Args:
        logits: `[batch, classes]`, of any floating dtype; computed in float32.
        labels: `[batch]` integers, where -100 marks an example without a label, or for the other
            two problems `[batch, classes]` (`[batch]` with one output).
        problem: The problem type.
        label_smoothing: Fraction of the target spread evenly over the classes (single-label only).

    Returns:
        `[batch]`, 0 where the label is -100.

    Raises:
        ValueError: The labels do not fit the logits, or smoothing does not fit the problem.

    Examples:
        >>> hard_loss(torch.zeros(1, 4), torch.tensor([2]), "single_label_classification")
        tensor([1.3863])
        >>> hard_loss(torch.tensor([[1.0], [4.0]]), torch.tensor([3.0, 3.0]), "regression")
        tensor([4., 1.])
    """
    logits = _classes(logits).float()
    if problem == "single_label_classification":
        if labels.is_floating_point() or labels.numel() != len(logits):
            raise ValueError(
                f"Single-label classification needs one integer label per example; got labels of "
                f"shape {list(labels.shape)} and {labels.dtype} for {len(logits)} examples. For "
                "several classes per example set config.problem_type='multi_label_classification'."
            )
        return F.cross_entropy(
            logits,
            labels.reshape(-1).long(),
            ignore_index=IGNORED_LABEL,
            reduction="none",
            label_smoothing=label_smoothing,
        )
    if label_smoothing:
        raise ValueError(
            f"label_smoothing_factor={label_smoothing} fits single-label classification only, "
            f"this is {problem}; set it to 0."
        )
    if labels.numel() != logits.numel():
        raise ValueError(
            f"The labels have shape {list(labels.shape)}; expected {list(logits.shape)}, as the "
            f"logits of this {problem} model."
        )
    target = labels.reshape(logits.shape).float()
    if problem == "regression":
        return (logits - target).square().mean(dim=1)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=1)


def labelled(labels: Tensor) -> Tensor:
    """Count the examples that have a label, as a 0-dimensional int64 tensor."""
    if labels.is_floating_point() or labels.ndim > 1:
        return torch.tensor(len(labels), device=labels.device)
    return (labels != IGNORED_LABEL).sum()


class MeanLossMixin(Trainer):
    """Gives a Trainer the supervised loss as a mean over the examples of each optimizer step.

    The gradient is the same for one batch of 16, four accumulated batches of 4 and two processes
    with 8 each, also where batches differ in size. Examples that accelerate repeats have weight 0.
    In evaluation the loss is the batch's mean. The model runs without labels, so its own loss is
    not used. Label smoothing applies to single-label classification.

    Raises:
        TypeError: The model has no config.
        ValueError: `compute_loss_func` is given, a training batch has no labels, the model has no
            padding token and needs one, or repeated examples of a stream cannot be told apart.
    """

    loss_is_scaled_for_ga = True
    _left: int = 0
    _stands_in: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None:
            raise ValueError(
                f"{type(self).__name__} computes its own loss and would ignore compute_loss_func; "
                "use transformers.Trainer with hfslim.training.checkpoint.CheckpointMixin for a "
                "custom loss."
            )
        if not hasattr(base_of(self.model), "config"):
            raise TypeError(
                f"{type(self).__name__} got {type(self.model).__name__}, which has no config: "
                "expected a transformers classifier, as AutoModelForSequenceClassification loads"
            )
        # `get_batch_samples` counts over processes itself: examples, not tokens.
        self.args = copy.copy(self.args)
        self.args.average_tokens_across_devices = False
        if self.args.label_names is None:
            # The model itself gets no labels, so its forward need not take any.
            self.label_names = ["labels"]
        sizes = (self.args.per_device_train_batch_size, self.args.per_device_eval_batch_size)
        reads = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        check_padding(self.model, reads, max(sizes), "the model")

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return count_stream(super()._get_dataloader(*args, **kwargs))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Fetch the batches of one optimizer step and count their examples over all processes.

        Returns:
            The batches, and a float tensor `[2]`: labelled examples, all examples.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(2, device=device)
        self._left, self._stands_in = len(batches), False
        for number, batch in enumerate(batches, 1):
            examples = find_batch_size(batch)
            if number == len(batches):
                real = real_examples(self.accelerator, examples)
                self._stands_in = real == 0
                if real < examples:
                    keep_first(batch, max(real, 1))
                examples = real
            labels = batch.get("labels")
            if examples and labels is not None:
                counts[0] += labelled(labels).to(device)
            counts[1] += examples
        return batches, self.accelerator.reduce(counts, reduction="sum")

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Run a batch forward and backward, as `transformers.Trainer.training_step`."""
        self._left -= 1
        counts = not (self._stands_in and self._left == 0)
        examples = 1.0 if num_items_in_batch is None else num_items_in_batch[1].item()
        share = Share(self.accelerator.num_processes / max(examples, 1.0), counts)
        with running(self.model, share):  # type: ignore[arg-type]  # there is a model
            return super().training_step(model, inputs, num_items_in_batch)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        """Leave the count to `get_batch_samples`; without it a loss is the mean of its batch."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute this process's share of the step's mean loss.

        Args:
            model: The wrapped model, which synchronises gradients.
            inputs: A batch.
            return_outputs: Whether to return the model's outputs too.
            num_items_in_batch: Counts of `get_batch_samples`; None for the mean of this batch.
        """
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError(
                f"The batch has no 'labels', only {', '.join(sorted(inputs))}; the loss needs "
                "them. Name the label column 'label' or 'labels'."
            )
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = self.hard_loss_share(logits_of(outputs), labels, num_items_in_batch)
        return (loss, with_loss(outputs, loss)) if return_outputs else loss

    def hard_loss_share(self, logits: Tensor, labels: Tensor, counts: Tensor | None) -> Tensor:
        """Return the hard loss of a batch as its share of the step's mean, a scalar.

        The sum over accumulated batches, averaged over processes, is the step's loss. The counts
        are those of `get_batch_samples`, or None for the mean of this batch.
        """
        live: Any = self.model
        problem = self.problem_of(labels)
        smoothing = self.label_smoother.epsilon if self.label_smoother and live.training else 0.0
        if counts is None:
            real = max(real_examples(self.accelerator, len(logits)), 1)
            logits, labels = logits[:real], labels[:real]
        losses = hard_loss(logits, labels.to(logits.device), problem, smoothing)
        return self.share(losses, labelled(labels) if counts is None else counts[0], counts is None)

    def problem_of(self, labels: Tensor | None) -> ProblemType:
        """Return the model's problem type, and set it in the config where the labels decide it."""
        live: Any = self.model
        problem = problem_type(live.config, labels)
        if live.config.problem_type is None and labels is not None:
            live.config.problem_type = problem
        return problem

    def share(self, losses: Tensor, count: Tensor, local: bool) -> Tensor:
        """Divide the sum of a batch's losses, `[batch]`, by a number of examples.

        The count is that of this batch if `local`, otherwise that of the whole step over all
        processes; the result is then multiplied by their number, as gradients are averaged.
        """
        processes = 1 if local else self.accelerator.num_processes
        share = share_of(self.model)  # type: ignore[arg-type]  # there is a model
        if share is not None and not share.counts:
            processes = 0
        return losses.sum() * (processes / count.clamp(min=1).to(losses.device))


def logits_of(outputs: Any) -> Tensor:
    """Return the logits of a classifier's outputs, a tuple or a `ModelOutput`.

    Raises:
        TypeError: The outputs have no logits.
        ValueError: The logits are not `[batch, classes]`.
    """
    if not isinstance(outputs, dict):
        return _classes(outputs[0])
    if outputs.get("logits") is None:
        raise TypeError(
            f"the model returns {sorted(outputs)} and no logits: load it as a classifier, by "
            "AutoModelForSequenceClassification, AutoModelForImageClassification or "
            "AutoModelForAudioClassification"
        )
    return _classes(outputs["logits"])


def _classes(logits: Tensor) -> Tensor:
    """Return the logits if they are a classifier's."""
    if logits.ndim != 2:
        raise ValueError(
            f"the model gives logits {list(logits.shape)}, a classifier's are [batch, classes]: "
            "load it by AutoModelForSequenceClassification, AutoModelForImageClassification or "
            "AutoModelForAudioClassification, and train its head"
        )
    return logits


def with_loss(outputs: Any, loss: Tensor) -> Any:
    """Put the loss before tuple outputs, where the evaluation loop expects it."""
    return outputs if isinstance(outputs, dict) else (loss, *outputs)
