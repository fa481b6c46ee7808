"""Arguments of a distillation run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from transformers import TrainingArguments

from hfslim.distillation.losses.feature_losses import FEATURE_LOSSES
from hfslim.distillation.losses.layer_maps import parse_map
from hfslim.distillation.losses.logit_losses import LOGIT_LOSSES

__all__ = ["DistillationConfig", "parse_weights"]

_OF_CACHES = ("teacher_cache_epochs", "teacher_cache_top_k", "teacher_cache_features")
TEACHER_DTYPES = ("float32", "bfloat16", "float16", "int8")


@dataclass
class DistillationConfig(TrainingArguments):
    """`TrainingArguments` plus what distillation needs.

    The loss is `(1 − alpha) · hard + alpha · logit_loss + Σ weight · feature loss`.

    Attributes:
        temperature: T > 0 that softens both models' outputs. 2 by default.
        alpha: Weight in [0, 1] of the loss on the teacher's logits; the labels' loss gets the rest.
            With 1 the training data need no labels.
        logit_loss: `kl` (in the form that fits the problem), `dkd` or `dist`.
        dkd_beta: Weight of DKD's part on the classes other than the label.
        feature_losses: Weight of each loss on features by its name: `hidden_mse`, `hidden_cosine`,
            `hidden_l1_cosine`, `attention`, `minilm`, `minilm_v2`.
        layer_map: Which layers the losses on hidden states and attentions pair: `uniform`, `last`,
            `skip`, `dynamic`, or pairs `[[student layer, teacher layer], ...]`, as a list or JSON.
        hidden_projection: Whether to train a linear map where hidden states differ in width.
        relation_heads: Relation heads of `minilm` and `minilm_v2`; the most that fit by default.
        temperature_end: Temperature at the end of the distillation, reached in even steps.
        alpha_end: Likewise, `alpha`.
        feature_weight_end: Factor of all feature losses at the end, from 1 at the beginning.
        distil_until: Fraction of the training steps in which the teacher is used; the rest trains
            on the labels alone. The schedules end there too.
        teacher_dtype: Dtype of the teacher's weights: `float32`, `bfloat16`, `float16`, or `int8`
            (linear maps in 8 bits); by default a model keeps its own and what is loaded gets the
            student's.
        teacher_compile: Backend of `torch.compile` for the teacher, such as `inductor`; by default
            it runs as it is.
        teacher_weights: Weight above 0 of each of several teachers, in their order; equal by
            default.
        teacher_mean: What several teachers' weighted mean is of: `probabilities` or `logits`.
        teacher_subset: Whether the teacher may know labels that the student does not.
        teacher_cache: Folder of the teacher's logits for the training data; filled before training
            where there is none. Examples are found by what they hold, so shuffling, processes and
            resume do not matter; what augmentation has changed is run through the teacher.
        teacher_cache_epochs: Number of epochs whose augmentation the cache keeps. Each example is
            then read with random numbers that `data_seed` (else `seed`), the epoch modulo this
            number and its index tell, so that it comes out the same on any process, after resume
            and in a later run. By default augmentation is left alone.
        teacher_cache_top_k: Number of the likeliest classes whose logits the cache keeps; the
            others share what is left evenly. By default all. For `kl` on one label per example, at
            one temperature.
        teacher_cache_features: Whether the cache keeps what `feature_losses` need as well: hidden
            states, and queries, keys and values, of every position. What that takes on disk is
            told before. Not for `attention` and `minilm`.
        allow_untrained_teacher: Accept a teacher with a fresh head or at chance level.

    Raises:
        ValueError: If a value is out of its range.
    """

    temperature: float = field(
        default=2.0, metadata={"help": "Softens the outputs of teacher and student; above 0."}
    )
    alpha: float = field(
        default=0.5,
        metadata={"help": "Weight of the distillation loss, 0 to 1; the labels get the rest."},
    )
    logit_loss: str = field(
        default="kl", metadata={"help": "Loss on the teacher's logits: kl, dkd or dist."}
    )
    dkd_beta: float = field(
        default=1.0, metadata={"help": "DKD's weight of the classes other than the label."}
    )
    feature_losses: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": 'Weights of losses on features, as JSON: {"hidden_mse": 1.0}.'},
    )
    layer_map: list[list[int]] | str | None = field(
        default="uniform",
        metadata={"help": "Which layers are paired: uniform, last, skip, dynamic, or JSON pairs."},
    )
    hidden_projection: bool = field(
        default=False,
        metadata={"help": "Train a linear map where hidden states differ in width."},
    )
    relation_heads: int | None = field(
        default=None, metadata={"help": "Relation heads of minilm and minilm_v2."}
    )
    temperature_end: float | None = field(
        default=None, metadata={"help": "Temperature at the end of the distillation."}
    )
    alpha_end: float | None = field(
        default=None, metadata={"help": "alpha at the end of the distillation."}
    )
    feature_weight_end: float | None = field(
        default=None, metadata={"help": "Factor of all feature losses at the end; 1 before."}
    )
    distil_until: float = field(
        default=1.0, metadata={"help": "Fraction of the steps in which the teacher is used."}
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={"help": f"Dtype of the teacher's weights: {', '.join(TEACHER_DTYPES)}."},
    )
    teacher_compile: str | None = field(
        default=None,
        metadata={"help": "Backend of torch.compile for the teacher, such as inductor."},
    )
    teacher_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each of several teachers."}
    )
    teacher_mean: str = field(
        default="probabilities",
        metadata={"help": "What several teachers' mean is of: probabilities or logits."},
    )
    teacher_subset: bool = field(
        default=False, metadata={"help": "Accept a teacher that knows more labels."}
    )
    teacher_cache: str | None = field(
        default=None, metadata={"help": "Folder for the teacher's logits; filled if it is new."}
    )
    teacher_cache_epochs: int | None = field(
        default=None, metadata={"help": "Epochs whose augmentation the cache keeps; then again."}
    )
    teacher_cache_top_k: int | None = field(
        default=None, metadata={"help": "Likeliest classes whose logits are cached; all if unset."}
    )
    teacher_cache_features: bool = field(
        default=False, metadata={"help": "Cache what feature losses need of the teacher as well."}
    )
    allow_untrained_teacher: bool = field(
        default=False,
        metadata={"help": "Accept a teacher with a fresh head or at chance level."},
    )

    def __post_init__(self) -> None:
        for name in ("temperature", "temperature_end"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; expected a number above 0, usually 1 to 10.")
        for name in ("alpha", "alpha_end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(
                    f"{name} is {value}; expected 0 (labels only) to 1 (teacher only)."
                )
        if not 0 < self.distil_until <= 1:
            raise ValueError(
                f"distil_until is {self.distil_until}; expected a fraction of the steps, above 0 "
                "and up to 1."
            )
        if self.logit_loss not in LOGIT_LOSSES:
            raise ValueError(
                f"logit_loss is {self.logit_loss!r}; expected one of {list(LOGIT_LOSSES)}."
            )
        for name in ("dkd_beta", "feature_weight_end"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; expected a number from 0 on.")
        for weight in self.teacher_weights or ():
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"teacher_weights holds {weight}; expected numbers above 0.")
        if self.teacher_mean not in ("probabilities", "logits"):
            raise ValueError(
                f"teacher_mean is {self.teacher_mean!r}; expected 'probabilities' or 'logits'."
            )
        if self.teacher_dtype is not None and self.teacher_dtype not in TEACHER_DTYPES:
            raise ValueError(
                f"teacher_dtype is {self.teacher_dtype!r}; expected one of {list(TEACHER_DTYPES)}."
            )
        if self.teacher_compile and parse_weights(self.feature_losses):
            raise ValueError(
                "feature_losses record what layers compute, which torch.compile hides: leave "
                "teacher_compile out, or distil from logits alone."
            )
        if self.relation_heads is not None and self.relation_heads < 1:
            raise ValueError(f"relation_heads is {self.relation_heads}; expected 1 or more.")
        parse_map(self.layer_map)
        self._check_cache()
        super().__post_init__()

    def _check_cache(self) -> None:
        features = parse_weights(self.feature_losses)
        if self.teacher_cache is None:
            for name in _OF_CACHES:
                if getattr(self, name) not in (None, False):
                    raise ValueError(
                        f"{name} says what a cache keeps: set teacher_cache, its folder."
                    )
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
        if self.teacher_cache_epochs is not None:
            if self.teacher_cache_epochs < 1:
                raise ValueError(
                    f"teacher_cache_epochs is {self.teacher_cache_epochs}; expected 1 or more."
                )
            if self.dataloader_persistent_workers:
                raise ValueError(
                    "teacher_cache_epochs tells each epoch's augmentation to the data loader, and "
                    "persistent workers do not hear of it: set dataloader_persistent_workers=False."
                )
        if self.teacher_cache_top_k is None:
            return
        if self.teacher_cache_top_k < 1:
            raise ValueError(
                f"teacher_cache_top_k is {self.teacher_cache_top_k}; expected 1 or more classes."
            )
        if self.logit_loss != "kl" or self.temperature_end is not None:
            what = "a temperature_end" if self.logit_loss == "kl" else self.logit_loss
            raise ValueError(
                f"teacher_cache_top_k keeps the largest logits, and {what} needs all of them: "
                "leave one out."
            )

    @property
    def objective(self) -> str:
        """The loss that is minimised, its terms by the names under which they are logged."""

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
    """Return the weights of losses on features, those of 0 left out.

    Args:
        given: A mapping, or one as JSON, or nothing.

    Raises:
        ValueError: A name is unknown, or a weight is no number from 0 on.
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
