"""Arguments of a distillation run."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, cast

from transformers import TrainingArguments

from hfslim.distillation.losses.feature_losses import FEATURE_LOSSES
from hfslim.distillation.losses.layer_maps import parse_map
from hfslim.distillation.losses.logit_losses import LOGIT_LOSSES

__all__ = ["DistillationConfig", "parse_weights"]

_OF_CACHES = ("teacher_cache_epochs", "teacher_cache_top_k", "teacher_cache_features")
TEACHER_DTYPES = ("float32", "bfloat16", "float16", "int8")


def _with_help(cls: type) -> type:
    """Give each field its text in the docstring as the help that `HfArgumentParser` shows."""
    texts = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(cls) or "", re.M))
    for one in fields(cls):
        if one.name in texts:
            one.metadata = MappingProxyType({"help": " ".join(texts[one.name].split())})
    return cls


@_with_help
@dataclass
class DistillationConfig(TrainingArguments):
    """`TrainingArguments` plus what distillation needs.

    The loss is `(1 − alpha) · hard + alpha · logit_loss + Σ weight · feature loss`.

    Attributes:
        temperature: T > 0 that softens both models' outputs. 2 by default.
        alpha: Weight in [0, 1] of the loss on the teacher's logits; the labels' loss gets the rest.
            With 1 the training data need no labels.
        logit_loss: `kl` (in the form that fits the problem), `dkd`, `dist`, or a loss of
            `register_loss`.
        dkd_beta: Weight of DKD's part on the classes other than the label.
        feature_losses: Weight of each loss on features by its name: `hidden_mse`, `hidden_cosine`,
            `hidden_l1_cosine`, `attention`, `minilm`, `minilm_v2`, or one of `register_loss`.
        layer_map: The pairs of layers that losses on hidden states and attentions compare:
            `uniform`, `last`, `skip`, `dynamic`, or `[[student layer, teacher layer], ...]`, as a
            list or JSON.
        hidden_projection: Whether to train a linear map where hidden states differ in width.
        relation_heads: Relation heads of `minilm` and `minilm_v2`; by default the most that fit.
        temperature_end: Temperature at the end of the distillation, interpolated linearly.
        alpha_end: `alpha` at the end, likewise.
        feature_weight_end: Factor of all feature losses at the end, from 1 at the beginning.
        distil_until: Fraction of the training steps that use the teacher; the rest trains on the
            labels alone. The schedules end there too.
        teacher_dtype: Dtype of the teacher's weights: `float32`, `bfloat16`, `float16`, or `int8`
            (linear layers in 8 bits); by default a model keeps its own and a loaded one gets the
            student's.
        teacher_compile: Backend of `torch.compile` for the teacher, such as `inductor`.
        teacher_weights: Weight above 0 of each of several teachers; equal by default.
        teacher_mean: Whether several teachers' `probabilities` or `logits` are averaged.
        teacher_subset: Whether the teacher may have labels that the student lacks.
        teacher_cache: Folder of the teacher's logits for the training data; filled before training
            if it is new. Examples are found by their content, whatever the order, the processes and
            resume; examples that augmentation changed are run through the teacher.
        teacher_cache_epochs: Number of epochs whose augmentation the cache keeps. The random
            numbers of each example are then seeded by `data_seed` (else `seed`), the epoch modulo
            this number and its index: the same on any process, after resume and in a later run. By
            default augmentation does not change.
        teacher_cache_top_k: Number of the most probable classes whose logits the cache keeps; the
            others share the rest evenly. By default all. For `kl` on one label per example, at one
            temperature.
        teacher_cache_features: Whether the cache also keeps the states that `feature_losses`
            compare: hidden states, and queries, keys and values, of every position. The size on
            disk is logged first. Not for `attention` and `minilm`.
        allow_untrained_teacher: Accept a teacher with a fresh head or at chance level.

    Raises:
        ValueError: If a value is out of its range.
    """

    temperature: float = 2.0
    alpha: float = 0.5
    logit_loss: str = "kl"
    dkd_beta: float = 1.0
    feature_losses: dict[str, float] | str | None = None
    layer_map: list[list[int]] | str | None = "uniform"
    hidden_projection: bool = False
    relation_heads: int | None = None
    temperature_end: float | None = None
    alpha_end: float | None = None
    feature_weight_end: float | None = None
    distil_until: float = 1.0
    teacher_dtype: str | None = None
    teacher_compile: str | None = None
    teacher_weights: list[float] | None = None
    teacher_mean: str = "probabilities"
    teacher_subset: bool = False
    teacher_cache: str | None = None
    teacher_cache_epochs: int | None = None
    teacher_cache_top_k: int | None = None
    teacher_cache_features: bool = False
    allow_untrained_teacher: bool = False

    def __post_init__(self) -> None:
        def number(lowest: float) -> Callable[[float], bool]:
            return lambda value: math.isfinite(value) and value >= lowest

        def positive(value: float) -> bool:
            return math.isfinite(value) and value > 0

        self._check(positive, "a number above 0, usually 1 to 10", "temperature", "temperature_end")
        weight = "0 (labels only) to 1 (teacher only)"
        self._check(lambda value: 0 <= value <= 1, weight, "alpha", "alpha_end")
        until = "a fraction of the steps, above 0 and up to 1"
        self._check(lambda value: 0 < value <= 1, until, "distil_until")
        self._check(LOGIT_LOSSES.__contains__, f"one of {list(LOGIT_LOSSES)}", "logit_loss")
        self._check(number(0), "a number from 0 on", "dkd_beta", "feature_weight_end")
        self._check(number(1), "1 or more", "relation_heads", "teacher_cache_epochs")
        self._check(number(1), "1 or more classes", "teacher_cache_top_k")
        means, dtypes = ("probabilities", "logits"), TEACHER_DTYPES
        self._check(means.__contains__, "'probabilities' or 'logits'", "teacher_mean")
        self._check(dtypes.__contains__, f"one of {list(dtypes)}", "teacher_dtype")
        for weight_of in self.teacher_weights or ():
            if not positive(weight_of):
                raise ValueError(f"teacher_weights holds {weight_of}; expected numbers above 0.")
        if self.teacher_compile and parse_weights(self.feature_losses):
            raise ValueError(
                "feature_losses record the outputs of layers, which torch.compile hides: leave "
                "teacher_compile out, or distil from logits alone."
            )
        parse_map(self.layer_map)
        self._check_cache()
        super().__post_init__()

    def _check(self, fits: Callable[[Any], bool], expected: str, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise ValueError(f"{name} is {value!r}; expected {expected}.")

    def _check_cache(self) -> None:
        features = parse_weights(self.feature_losses)
        if self.teacher_cache is None:
            for name in _OF_CACHES:
                if getattr(self, name) not in (None, False):
                    raise ValueError(f"{name} needs a cache: set teacher_cache, its folder.")
            return
        if features and not self.teacher_cache_features:
            raise ValueError(
                "teacher_cache holds logits alone, and feature_losses need the teacher itself; "
                "leave one of them out, or set teacher_cache_features=True to keep hidden states."
            )
        if self.teacher_cache_features and not features:
            raise ValueError("teacher_cache_features keeps what feature_losses need: name some.")
        wide = [name for name in features if FEATURE_LOSSES[name].needs_attentions]
        if wide:
            raise ValueError(
                f"{wide[0]} compares attention maps, which teacher_cache_features does not keep; "
                "use minilm_v2 or a loss on hidden states, or leave teacher_cache out."
            )
        if self.teacher_cache_epochs is not None and self.dataloader_persistent_workers:
            raise ValueError(
                "teacher_cache_epochs changes the data set at each epoch, and persistent workers "
                "keep the old one: set dataloader_persistent_workers=False."
            )
        whole = self.logit_loss != "kl" or self.temperature_end is not None
        if self.teacher_cache_top_k is not None and whole:
            what = "a temperature_end" if self.logit_loss == "kl" else self.logit_loss
            raise ValueError(
                f"teacher_cache_top_k keeps the largest logits, and {what} needs all of them: "
                "leave one out."
            )

    @property
    def objective(self) -> str:
        """The loss that is minimised, with its terms by their logged names."""

        def value(name: str) -> str:
            end = getattr(self, f"{name}_end")
            return f"{getattr(self, name):g}" + ("" if end is None else f"→{end:g}")

        alpha = value("alpha")
        rest = f"{1 - self.alpha:g}" if self.alpha_end is None else f"(1 − {alpha})"
        terms = [f"{rest} · loss_hard", f"{alpha} · loss_distillation ({self.logit_loss})"]
        weights = parse_weights(self.feature_losses)
        terms += [f"{weight:g} · loss_{name}" for name, weight in weights.items()]
        until = "" if self.distil_until == 1 else f", for {self.distil_until:g} of the steps"
        return f"{' + '.join(terms)}, temperature {value('temperature')}{until}"


def parse_weights(given: Mapping[str, float] | str | None) -> dict[str, float]:
    """Return the weights of feature losses without those of 0.

    Args:
        given: A mapping, its JSON, or None.

    Raises:
        ValueError: A name is unknown, or a weight is not a number from 0 on.
    """
    if isinstance(given, str):
        try:
            given = cast(dict[str, float], json.loads(given))
        except json.JSONDecodeError as error:
            raise ValueError(
                f'feature_losses is {given!r}; expected JSON such as {{"hidden_mse": 1.0}}.'
            ) from error
    if not isinstance(given, Mapping | None):
        raise ValueError(
            f'feature_losses is {given!r}; expected a weight for each, as {{"hidden_mse": 1.0}}.'
        )
    for name, weight in (given or {}).items():
        if name not in FEATURE_LOSSES:
            raise ValueError(
                f"feature_losses names {name!r}; expected some of {list(FEATURE_LOSSES)}."
            )
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise ValueError(f"the weight of {name} is {weight!r}; expected a number from 0 on.")
    return {name: float(weight) for name, weight in (given or {}).items() if weight}
