"""What a teacher says during training: as it runs, or from its cache."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from rich.progress import track
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hfslim.distillation.cache.augmentation import SeededExamples
from hfslim.distillation.cache.teacher_cache import KEYS, Answers, CacheError, TeacherCache
from hfslim.distillation.cache.top_k import TopK
from hfslim.distillation.config import DistillationConfig
from hfslim.distillation.losses.capture import Seen
from hfslim.distillation.losses.feature_terms import FeatureTerms
from hfslim.distillation.teacher.clock import TeacherClock
from hfslim.training.objective import problem_type

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

__all__ = ["CacheMixin"]

logger = logging.get_logger(__name__)


class CacheMixin(_Base):
    """Asks the teacher, or its cache, which is filled before training where there is none."""

    args: DistillationConfig
    teachers: Any
    features: FeatureTerms | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clock = TeacherClock(self.args.device)
        self._cache: TeacherCache | None = None
        self._from_cache = False

    @property
    def _top_k(self) -> TopK | None:
        k = self.args.teacher_cache_top_k
        return None if k is None else TopK(k, self.args.temperature)

    def _open_cache(self, folder: str) -> None:
        """Open the teacher cache, filled by all processes where there is none yet."""
        self._check_top_k(None)
        self._cache = None
        kept = [self.teachers.fingerprint(), self.accelerator.mixed_precision]
        if self._top_k is not None:
            kept.append(f"top {self._top_k.k} at {self._top_k.temperature:g}")
        if self.features is not None:
            kept.append(str(self.features.packing))
        data = self._examples()
        if isinstance(data, SeededExamples):
            kept.append(f"{data.epochs} epochs of augmentation by seed {data.seed}")
        identity = "-".join(kept)
        exists = broadcast_object_list([Path(folder).exists()])[0]
        if not exists:
            # A data loader draws from the generator that dropout is going to use.
            with torch.random.fork_rng(devices=[]):
                answers = self._all_answers(data, Path(folder))
                if self.accelerator.is_main_process:
                    TeacherCache.write(folder, identity, answers, self._top_k)
                else:
                    deque(answers, maxlen=0)
            self.accelerator.wait_for_everyone()
            if not Path(folder).exists():
                raise CacheError(
                    f"{folder} was filled by the first process, and this one does not see it: set "
                    "teacher_cache to a folder that all machines share."
                )
        self._cache = TeacherCache(folder, identity)

    def _examples(self) -> Any:
        """Return the training data, whose augmentation is the same each time if that is asked."""
        data: Any = self.train_dataset
        if not hasattr(data, "__len__"):
            raise ValueError(
                "teacher_cache is filled from a data set of known length, and train_dataset "
                "has none; leave teacher_cache out for streamed data."
            )
        epochs = self.args.teacher_cache_epochs
        if epochs is not None and not isinstance(data, SeededExamples):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            self.train_dataset = data = SeededExamples(data, seed, epochs)
        return data

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.train_dataset, SeededExamples):
            self.train_dataset.epoch = kwargs["epoch"]
        super()._run_epoch(*args, **kwargs)

    def _check_top_k(self, labels: Tensor | None) -> None:
        """Refuse to keep the largest logits where all are needed, or all are kept."""
        if self._top_k is None:
            return
        live: Any = self.model
        problem, classes = problem_type(live.config, labels), live.config.num_labels
        if problem != "single_label_classification":
            raise ValueError(
                "teacher_cache_top_k keeps the likeliest of classes that exclude each other, and "
                f"this is {problem}: leave it out, so that all logits are kept."
            )
        if self._top_k.k >= classes:
            raise ValueError(
                f"teacher_cache_top_k is {self._top_k.k} and there are {classes} classes: leave it "
                "out, so that all logits are kept."
            )

    def _all_answers(self, data: Any, folder: Path) -> Iterator[Answers]:
        # What training leaves out of an epoch's end, another epoch's order brings in.
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            loader = self.get_test_dataloader(data)
        finally:
            self.args.dataloader_drop_last = drops
        epochs = self.args.teacher_cache_epochs or 1
        quiet = self.args.disable_tqdm or not self.accelerator.is_main_process
        estimated = self.features is None
        total = epochs * len(loader)
        batches = track(
            _epochs_of(loader, data, epochs), "filling the teacher cache", total, disable=quiet
        )
        for batch in batches:
            batch = self._prepare_inputs(batch)
            parts: tuple[Tensor, ...]
            if self.features is None:
                parts = (batch[KEYS], self._teacher_logits(batch))
            else:
                capture = self.features.captures[1]
                with capture.recording() as shown:
                    logits = self._teacher_logits(batch, **capture.arguments)
                packed = self.features.packing.pack(shown)
                mask = self.features.mask(packed.shape[1], self.teachers.of_student(batch))
                # Padding a bool makes another dtype of it, on the processes that pad alone.
                whole = mask.expand(packed.shape[:2]).int()
                across = self.accelerator.pad_across_processes
                parts = (batch[KEYS], logits, across(packed, dim=1), across(whole, dim=1))
            answers = Answers(*self.accelerator.gather_for_metrics(parts))
            if not estimated:
                self._estimate(answers, epochs * len(data), folder)
                estimated = True
            yield answers

    def _estimate(self, answers: Answers, examples: int, folder: Path) -> None:
        """Say what hidden states are going to take on disk, from the first batch."""
        if not self.accelerator.is_main_process:
            return
        assert answers.positions is not None and answers.mask is not None
        each = answers.mask.sum().item() / len(answers.mask)
        size = examples * each * answers.positions.shape[-1] * 4
        place = next(one for one in folder.absolute().parents if one.exists())
        free = shutil.disk_usage(place).free
        text = (
            f"hidden states of {examples:,} examples, about {each:.0f} positions of "
            f"{answers.positions.shape[-1]} numbers each, take about {size / 1e9:.3g} GB; "
            f"{free / 1e9:.3g} GB are free in {place}"
        )
        if size > free:
            raise CacheError(f"{text}: leave teacher_cache_features out, or set teacher_cache.")
        logger.warning(text)

    def _teacher_logits(self, inputs: dict[str, Any], **options: Any) -> Tensor:
        with self._clock.running():
            if self._cache is not None and self.features is None:
                found = self._cache.find(inputs[KEYS])
                self._from_cache = found is not None
                if found is None:
                    self._tell_of_miss()
                else:
                    return self._cache.logits(found).to(inputs[KEYS].device)
            with self.accelerator.autocast():
                return self.teachers.logits(inputs, **options)

    def _run_both(
        self, model: nn.Module, student_inputs: dict[str, Any], inputs: dict[str, Any]
    ) -> tuple[Any, Tensor, dict[str, Tensor]]:
        """Run student and teacher: the student's outputs, the teacher's logits, feature losses."""
        if self.features is None:
            return model(**student_inputs), self._teacher_logits(inputs), {}
        mine, theirs = self.features.captures
        with mine.recording() as seen:
            outputs = model(**student_inputs, **mine.arguments)
        with self._clock.running():
            found = self._find_features(seen, student_inputs, inputs)
        if found is not None:
            taught, shown = found
        else:
            with theirs.recording() as shown:
                taught = self._teacher_logits(inputs, **theirs.arguments)
        return outputs, taught, self.features.losses(seen, shown, student_inputs)

    def _find_features(
        self, seen: Seen, student_inputs: dict[str, Any], inputs: dict[str, Any]
    ) -> tuple[Tensor, Seen] | None:
        """Return the teacher's logits and hidden states of a batch, if they are all cached."""
        self._from_cache = False
        if self._cache is None or self.features is None or not self.features.pairs_are_kept():
            return None
        examples = self._cache.find(inputs[KEYS])
        if examples is None:
            self._tell_of_miss()
            return None
        states = next(iter([*seen.hidden, *seen.vectors]))
        mask = self.features.mask(states.shape[1], student_inputs)
        positions = self._cache.positions(examples, mask.expand(states.shape[:2]))
        if positions is None:
            return None
        self._from_cache = True
        logits = self._cache.logits(examples).to(states.device)
        return logits, self.features.packing.unpack(positions)

    def _tell_of_miss(self) -> None:
        logger.warning_once(
            f"an example is not in {self.args.teacher_cache}, so its batch goes through the "
            "teacher; teacher_cache_hits in the log tells how often. Where augmentation changes "
            "examples, set teacher_cache_epochs."
        )


def _epochs_of(loader: Any, data: Any, epochs: int) -> Iterator[Any]:
    for epoch in range(epochs):
        if isinstance(data, SeededExamples):
            data.epoch = epoch
        yield from loader
