"""The teachers' answers from a cache, which is filled before the training if it is new."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from rich.progress import track
from torch import Tensor
from transformers.utils import logging

from hfslim.distillation.cache.examples import KEYS, SeededExamples
from hfslim.distillation.cache.teacher_cache import CachedBatch, CacheError, TeacherCache, TopK
from hfslim.distillation.config import DistillationConfig
from hfslim.distillation.losses.capture import CapturedStates
from hfslim.distillation.losses.feature_terms import FeatureTerms
from hfslim.distillation.teacher.answers import TeacherAnswer, TeacherAnswers
from hfslim.training.objective import problem_type

__all__ = ["CachedAnswers", "cacheable"]

logger = logging.get_logger(__name__)


def cacheable(data: Any, args: DistillationConfig) -> Any:
    """Return the training data, with reproducible augmentation under `teacher_cache_epochs`.

    Raises:
        ValueError: The data have no length.
    """
    if not hasattr(data, "__len__"):
        raise ValueError(
            "teacher_cache is filled from a data set of known length, and train_dataset has none; "
            "leave teacher_cache out for streamed data."
        )
    if args.teacher_cache_epochs is None or isinstance(data, SeededExamples):
        return data
    seed = args.seed if args.data_seed is None else args.data_seed
    return SeededExamples(data, seed, args.teacher_cache_epochs)


class CachedAnswers(TeacherAnswers):
    """Reads the answers from the cache, and runs the teachers on batches that it lacks.

    All processes fill a new cache together.

    Args:
        trainer: The Trainer, whose `train_dataset` is `cacheable`.
        terms: The feature losses, if there are any.

    Raises:
        CacheError: The cache is damaged, has another identity, or has no room on the disk.
        ValueError: `teacher_cache_top_k` does not fit the problem.
    """

    def __init__(self, trainer: Any, terms: FeatureTerms | None) -> None:
        super().__init__(trainer.teachers, trainer.accelerator)
        self._trainer, self._args = trainer, trainer.args
        k = self._args.teacher_cache_top_k
        self._top_k = None if k is None else TopK(k, self._args.temperature)
        self._check_top_k(None)
        folder = Path(self._args.teacher_cache)
        identity = self._identity(terms)
        if not broadcast_object_list([folder.exists()])[0]:
            # A data loader draws from the generator that dropout is going to use.
            with torch.random.fork_rng(devices=[]):
                batches = self._all_batches(folder, terms)
                if self.accelerator.is_main_process:
                    TeacherCache.write(folder, identity, batches, self._top_k)
                else:
                    deque(batches, maxlen=0)
            self.accelerator.wait_for_everyone()
            if not folder.exists():
                raise CacheError(
                    f"{folder} was filled by the first process and does not exist for this one: "
                    "set teacher_cache to a folder that all machines share."
                )
        self.cache = TeacherCache(folder, identity)

    def of(
        self,
        batch: dict[str, Any],
        terms: FeatureTerms | None = None,
        student: CapturedStates | None = None,
    ) -> TeacherAnswer:
        """Return the answer to a batch, as `TeacherAnswers.of`."""
        self._check_top_k(batch.get("labels"))
        with self.clock.running():
            found = self._find(batch, terms, student)
        return found or replace(super().of(batch, terms), cached=False)

    def _find(
        self, batch: dict[str, Any], terms: FeatureTerms | None, student: CapturedStates | None
    ) -> TeacherAnswer | None:
        """Return the answer if all that the step needs is cached."""
        if terms is not None and not terms.pairs_are_kept():
            return None
        keys: Tensor = batch[KEYS]
        examples = self.cache.find(keys)
        if examples is None:
            logger.warning_once(
                f"an example is not in {self._args.teacher_cache}, so its batch goes through the "
                "teacher; teacher_cache_hits in the log is the fraction of cached examples. If "
                "augmentation changes examples, set teacher_cache_epochs."
            )
            return None
        states = None
        if terms is not None and student is not None:
            first = [*student.hidden, *student.vectors][0]
            mask = terms.mask(first.shape[1], self.teachers.of_student(batch))
            packed = self.cache.positions(examples, mask.expand(first.shape[:2]))
            if packed is None:
                return None
            states = terms.packing.unpack(packed)
        return TeacherAnswer(self.cache.logits(examples).to(keys.device), states, cached=True)

    def _identity(self, terms: FeatureTerms | None) -> str:
        parts = [self.teachers.fingerprint(), self.accelerator.mixed_precision]
        if self._top_k is not None:
            parts.append(f"top {self._top_k.k} at {self._top_k.temperature:g}")
        if terms is not None:
            parts.append(str(terms.packing))
        data = self._trainer.train_dataset
        if isinstance(data, SeededExamples):
            parts.append(f"{data.epochs} epochs of augmentation by seed {data.seed}")
        return "-".join(parts)

    def _check_top_k(self, labels: Tensor | None) -> None:
        """Raise ValueError if the top k does not fit the problem or the number of classes."""
        if self._top_k is None:
            return
        config = self._trainer.model.config
        problem, classes = problem_type(config, labels), config.num_labels
        if problem != "single_label_classification":
            raise ValueError(
                "teacher_cache_top_k keeps the most probable of mutually exclusive classes, and "
                f"this is {problem}: leave it out, so that all logits are kept."
            )
        if self._top_k.k >= classes:
            raise ValueError(
                f"teacher_cache_top_k is {self._top_k.k} and there are {classes} classes: leave it "
                "out, so that all logits are kept."
            )

    def _all_batches(self, folder: Path, terms: FeatureTerms | None) -> Iterator[CachedBatch]:
        """Run the teachers on the training data, and yield the batches of all processes."""
        args, data = self._args, self._trainer.train_dataset
        # An epoch may drop its last examples, and another epoch's order may need them.
        drops, args.dataloader_drop_last = args.dataloader_drop_last, False
        try:
            loader = self._trainer.get_test_dataloader(data)
        finally:
            args.dataloader_drop_last = drops
        epochs = args.teacher_cache_epochs or 1
        batches = track(
            _epochs_of(loader, data, epochs),
            "filling the teacher cache",
            epochs * len(loader),
            disable=args.disable_tqdm or not self.accelerator.is_main_process,
        )
        for number, batch in enumerate(batches):
            inputs = self._trainer._prepare_inputs(batch)
            answer = super().of(inputs, terms)
            parts = [inputs[KEYS], answer.logits]
            if terms is not None and answer.states is not None:
                packed = terms.packing.pack(answer.states)
                mask = terms.mask(packed.shape[1], self.teachers.of_student(inputs))
                # Padding changes the dtype of a bool, on the processes that pad.
                whole = mask.expand(packed.shape[:2]).int()
                across = self.accelerator.pad_across_processes
                parts += [across(packed, dim=1), across(whole, dim=1)]
            gathered = CachedBatch(*self.accelerator.gather_for_metrics(parts))
            if number == 0 and terms is not None and self.accelerator.is_main_process:
                _check_disk(gathered, epochs * len(data), folder)
            yield gathered


def _epochs_of(loader: Any, data: Any, epochs: int) -> Iterator[Any]:
    for epoch in range(epochs):
        if isinstance(data, SeededExamples):
            data.epoch = epoch
        yield from loader


def _check_disk(first: CachedBatch, examples: int, folder: Path) -> None:
    """Estimate the size of the hidden states from the first batch, and log it or raise."""
    assert first.positions is not None and first.mask is not None
    positions, width = first.mask.sum().item() / len(first.mask), first.positions.shape[-1]
    size = examples * positions * width * 4
    place = next(one for one in folder.absolute().parents if one.exists())
    free = shutil.disk_usage(place).free
    text = (
        f"hidden states of {examples:,} examples, about {positions:.0f} positions of {width} "
        f"numbers each, take about {size / 1e9:.3g} GB; {free / 1e9:.3g} GB are free in {place}"
    )
    if size > free:
        raise CacheError(f"{text}: leave teacher_cache_features out, or set teacher_cache.")
    logger.warning(text)
