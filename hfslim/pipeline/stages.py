"""The stages of a recipe, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments

from hfslim.anatomy.structure import Kind
from hfslim.distillation import DistillationConfig
from hfslim.pruning.in_training.schedules import Pace, Schedule
from hfslim.pruning.obs.reconstruction import Reconstruction, check_reconstruction
from hfslim.pruning.scores.criteria import Criteria, criteria_by_kind, learns, usual_criterion
from hfslim.pruning.target import Target
from hfslim.sparsity.oneshot import Method, check_scope
from hfslim.sparsity.weight_callback import TrainingMethod, WeightPruningCallback
from hfslim.sparsity.weight_masks import Goal, Scope

Way = Literal["full", "head", "gradual", "lora"]


@dataclass(frozen=True)
class Stage:
    """One step of the path.

    Attributes:
        name: The stage's name in a recipe.
        arguments: The arguments class whose keys the stage takes as well; None if it cannot train.
    """

    name: ClassVar[str]
    arguments: ClassVar[type | None] = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the recipe says of this stage, with defaults filled in, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Transfer(Stage):
    """Fine-tune the model on the labels.

    `full` trains all of it; `head` its head alone; `gradual` the head first, then one layer after
    another, in `unfrozen_at` of the steps; `lora` adapters of `lora_rank` and the head, folded into
    the weights at the end. `l2_sp` is the strength of the pull back to the pretrained weights.
    """

    name = "transfer"
    arguments = TrainingArguments
    method: Way = "full"
    unfrozen_at: float = 0.5
    lora_rank: int = 8
    l2_sp: float = 0.0
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.unfrozen_at <= 1:
            raise ValueError(f"unfrozen_at {self.unfrozen_at} must be above 0 and up to 1")
        check_rank(self.lora_rank)
        if self.l2_sp < 0:
            raise ValueError(f"l2_sp must be 0 or more, got {self.l2_sp}")
        if self.l2_sp and self.method in ("head", "lora"):
            raise ValueError(
                f"l2_sp pulls back pretrained weights, and method {self.method!r} does not train "
                "them: use 'full' or 'gradual', or leave l2_sp out"
            )


@dataclass(frozen=True)
class Distil(Stage):
    """Train the model on the outputs of a teacher, or of several, and the labels.

    With `lora_rank` adapters of that rank and the head train, and are folded in at the end.
    """

    name = "distil"
    arguments = DistillationConfig
    teacher: str | tuple[str, ...] | None = None
    lora_rank: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_rank(self.lora_rank)


@dataclass(frozen=True)
class Recover(Stage):
    """Train the cut model on the outputs of the model before its first cut, or named teachers.

    With `lora_rank` adapters of that rank and the head train, and are folded in at the end.
    """

    name = "recover"
    arguments = DistillationConfig
    teacher: str | tuple[str, ...] | None = None
    lora_rank: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_rank(self.lora_rank)


class Cut(Stage):
    """Take something away: at once from calibration data, or little by little in training.

    It is gradual where a `schedule`, `num_train_epochs` or `max_steps` is given.
    """

    arguments: ClassVar[type | None] = DistillationConfig
    max_examples: int
    schedule: Schedule | None
    start: float
    end: float
    teacher: str | tuple[str, ...] | None
    training: Mapping[str, Any]

    @property
    def gradual(self) -> bool:
        """Whether the model trains while it is cut."""
        trains = {"num_train_epochs", "max_steps"} & set(self.training)
        return self.schedule is not None or bool(trains)

    def _check(self) -> Pace:
        """Check what all cuts have, and return when something goes if it is gradual."""
        if self.max_examples < 1:
            raise ValueError(f"max_examples must be at least 1, got {self.max_examples}")
        if self.training and not self.gradual:
            raise ValueError(
                f"{sorted(self.training)} need training: add num_train_epochs for gradual pruning, "
                "or move them to a `recover` stage"
            )
        return Pace(self.schedule or "cubic", self.start, self.end, None)


@dataclass(frozen=True)
class Prune(Cut):
    """Remove units of the model.

    The target's cost is that of a forward pass of `batch_size` examples. Where nothing is said,
    units are scored by `obs` and weights reconstructed in one go, by `fisher` and not reconstructed
    if it is gradual; dimensions by `fisher` at any rate.
    """

    name = "prune"
    target: Mapping[str, Any]
    units: tuple[Kind, ...] = ("heads", "neurons")
    criterion: Criteria | None = None
    reconstruction: Reconstruction | None = None
    max_examples: int = 512
    batch_size: int = 1
    schedule: Schedule | None = None
    start: float = 0.0
    end: float = 0.5
    teacher: str | tuple[str, ...] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Target.parse(self.target, self.units)
        when = "training" if self.gradual else "calibration"
        if self.criterion is None:
            object.__setattr__(self, "criterion", usual_criterion(self.units, when))
        assert self.criterion is not None
        criteria = criteria_by_kind(self.criterion, self.units, when)
        pace = self._check()
        if learns(criteria):
            pace.check_learned()
        if self.reconstruction is None:
            object.__setattr__(self, "reconstruction", "none" if self.gradual else "weights")
        assert self.reconstruction is not None
        check_reconstruction(self.reconstruction)
        if self.gradual and self.reconstruction != "none":
            raise ValueError(
                f"reconstruction {self.reconstruction!r} is for a cut in one go: training mends "
                "the weights of a gradual one"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def __str__(self) -> str:
        if self.gradual:
            how = "little by little while training"
        else:
            how = (
                f"in one go, from up to {self.max_examples} examples on each process; "
                f"reconstruction: {self.reconstruction}"
            )
        return f"pruning to {dict(self.target)} by criterion {self.criterion}, {how}"


@dataclass(frozen=True)
class Student(Cut):
    """Take some of the model's own layers, heads, neurons and dimensions as a student.

    `layers` is a number of evenly spaced layers, or a list of which. Units are scored by `fisher`.
    A `recover` stage then teaches the student by the model that it was taken from.
    """

    name = "student"
    arguments = None
    gradual = False
    layers: int | tuple[int, ...] | None = None
    heads: int | None = None
    neurons: int | None = None
    dimensions: int | None = None
    max_examples: int = 512

    def __post_init__(self) -> None:
        if not any((self.layers, self.heads, self.neurons, self.dimensions)):
            raise ValueError("give layers, heads, neurons or dimensions: what the student has")
        if self.max_examples < 1:
            raise ValueError(f"max_examples must be at least 1, got {self.max_examples}")

    @property
    def numbers(self) -> dict[str, Any]:
        """What the student is to have."""
        names = ("layers", "heads", "neurons", "dimensions")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Sparsify(Cut):
    """Set single weights of the model to zero.

    Where nothing is said, `sparsegpt` chooses them in one go, `magnitude` if it is gradual.
    """

    name = "sparsify"
    sparsity: float | None = None
    pattern: str | None = None
    method: Method | TrainingMethod | None = None
    scope: Scope | None = None
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    max_examples: int = 512
    schedule: Schedule | None = None
    start: float = 0.0
    end: float = 0.5
    teacher: str | tuple[str, ...] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method is None:
            object.__setattr__(self, "method", "magnitude" if self.gradual else "sparsegpt")
        if self.gradual:
            self.callback()
        else:
            Goal.parse(self.sparsity, self.pattern)
            object.__setattr__(self, "scope", check_scope(str(self.method), self.scope))
        self._check()

    def callback(self) -> WeightPruningCallback:
        """Return what prunes while a Trainer trains."""
        Goal.parse(self.sparsity, self.pattern)
        return WeightPruningCallback(
            self.sparsity,
            self.pattern,
            method=self.method,  # type: ignore[arg-type]  # which the callback checks
            scope=self.scope or "global",
            schedule=self.schedule or "cubic",
            start=self.start,
            end=self.end,
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
        )


@dataclass(frozen=True)
class Measure(Stage):
    """Compare the model with the one before its first cut, and write the report."""

    name = "measure"
    batch_sizes: tuple[int, ...] = (1, 32)
    length: int | None = None

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes must be 1 or more, got {list(self.batch_sizes)}")
        if self.length is not None and self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")


@dataclass(frozen=True)
class Push(Stage):
    """Upload the model, its processor, card, report and recipe to the Hub."""

    name = "push"
    hub_model_id: str
    hub_private_repo: bool | None = None
    hub_revision: str | None = None

    def __post_init__(self) -> None:
        validate_repo_id(self.hub_model_id)


def check_rank(rank: int | None) -> None:
    """Refuse a rank of LoRA below 1."""
    if rank is not None and rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {rank}")


STAGES: dict[str, type[Stage]] = {
    stage.name: stage
    for stage in (Transfer, Distil, Student, Prune, Sparsify, Recover, Measure, Push)
}


def listed(sources: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the sources that a key of a recipe names: none, one or several.

    Examples:
        >>> listed("user/teacher"), listed(None)
        (('user/teacher',), ())
    """
    return (sources,) if isinstance(sources, str) else tuple(sources or ())
