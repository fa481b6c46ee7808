"""The base class of all stages, and the registry that recipes find them in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from hfslim.pipeline.manifest import StageRecord

if TYPE_CHECKING:
    from hfslim.pipeline.run_state import RunState

DDP_ONLY = ("DDP",)
DDP_OR_ZERO2 = ("DDP", "ZeRO-2")
CUTS = "a `prune`, `student` or `sparsify` stage"
"""The stages that cut, as messages name them."""


class LaunchNeed(NamedTuple):
    """Something that trains only under some launches.

    Attributes:
        what: Its name in the error message.
        ways: The ways to train that support it, keys of `CONFIGURATIONS`.
        otherwise: The end of the message: what to do under another launch.
    """

    what: str
    ways: tuple[str, ...]
    otherwise: str = ""


@dataclass(frozen=True)
class Stage:
    """One step of a recipe.

    A subclass is a frozen dataclass. Its fields are the keys that a recipe can set, and
    `__post_init__` checks their values. A subclass that sets `name` is registered: recipes accept
    that name as soon as the module of the class is imported.

    Attributes:
        name: The name in recipes.
        arguments: The arguments class whose keys the stage accepts too, in its field `training`;
            None if the stage cannot train.
        makes_model: Whether the stage saves a new model, on which the next one works.
        cuts: Whether the new model is smaller or sparser; reports compare with the one before.
        makes_zeros: Whether later training must hold zeros of single weights.
        takes_untrained: Whether the stage can work on a model that has never been trained.
        uploads: Whether the stage uploads the model, for which it needs a login.
    """

    name: ClassVar[str]
    arguments: ClassVar[type | None] = None
    makes_model: ClassVar[bool] = True
    cuts: ClassVar[bool] = False
    makes_zeros: ClassVar[bool] = False
    takes_untrained: ClassVar[bool] = False
    uploads: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            return
        other = STAGES.setdefault(cls.name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"the stage name {cls.name!r} belongs to {other.__module__}.{other.__qualname__}: "
                "choose another name"
            )
        STAGES[cls.name] = cls

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of the stage with their values, defaults included, ready for JSON."""
        return asdict(self)

    @property
    def trains(self) -> bool:
        """Whether the stage trains the model, and so gets `args`."""
        return self.arguments is not None

    @property
    def taught(self) -> bool:
        """Whether the model learns from a teacher."""
        return False

    @property
    def named_teachers(self) -> tuple[str, ...]:
        """The teachers that the recipe names for this stage."""
        return ()

    def launch_needs(self) -> Iterable[LaunchNeed]:
        """Return what limits the launches under which the stage can train."""
        return ()

    def check_place(self, before: Sequence[Stage], teacher: bool) -> None:
        """Check the place of the stage in a recipe.

        Args:
            before: The stages before this one.
            teacher: Whether the recipe names a teacher for all stages.

        Raises:
            ValueError: Something that the stage needs is missing before it.
        """

    def check_model(self, state: RunState) -> None:
        """Check the recipe's model before any stage runs; every process calls this.

        Raises:
            ValueError: The stage will not work on this model.
        """

    def run(self, state: RunState, record: StageRecord, args: Any) -> None:
        """Do the work; every process calls this.

        Args:
            state: The run: loads the current model and the examples, trains, evaluates and saves.
            record: The stage's entry in the manifest, which the stage adds its figures to.
            args: An instance of `arguments`; None if the stage does not train.
        """
        raise NotImplementedError


STAGES: dict[str, type[Stage]] = {}
"""The stages by their names."""


def check_rank(rank: int | None) -> None:
    """Raise `ValueError` for a LoRA rank below 1."""
    if rank is not None and rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {rank}")
