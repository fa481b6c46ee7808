"""Recipes, read from YAML and the command line into frozen dataclasses and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from hfslim.pipeline.opening import check_source, sources_of
from hfslim.pipeline.schema import (
    RecipeError,
    build,
    convert_all,
    join,
    mapping_at,
    nearest,
    read_yaml,
    shown,
    types_of,
)
from hfslim.pipeline.stages import STAGES, Stage
from hfslim.tasks import METRICS, TASKS, DataConfig, make_config

__all__ = ["Recipe", "RecipeError", "load_recipe", "override", "parse_recipe"]

SET_ELSEWHERE = {
    "output_dir": "set output_dir at the top of the recipe",
    "seed": "set seed at the top of the recipe",
    "hub_token": "log in with `hf auth login`, or set HF_TOKEN",
    "remove_unused_columns": "the task decides it",
    "resume_from_checkpoint": "a second run of the recipe resumes by itself",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the stages decide it"),
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"), "add a `push` stage"
    ),
}
"""Keys of training arguments that a recipe does not accept, with what to do instead."""


@dataclass(frozen=True)
class Recipe:
    """A task, its data, a model and the stages that compress it.

    Attributes:
        task: `text-classification`, `image-classification` or `audio-classification`.
        data: Where the examples come from.
        stages: The stages, in order.
        output_dir: Folder of all results.
        model: Hub id or folder of the model to start from.
        model_config: `model_type` and fields of an untrained model to start from instead.
        processor: Hub id or folder of the processor; by default that of `model`.
        teacher: Hub id or folder, or a list, for the stages that name no teacher themselves.
        metric: The metric that is evaluated after each stage; by default `accuracy`, for
            regression `pearson`.
        training: Arguments of every training stage.
        seed: Seed of data, training and pruning.
    """

    task: str
    data: DataConfig
    stages: tuple[Stage, ...]
    output_dir: str
    model: str | None = None
    model_config: Mapping[str, Any] | None = None
    processor: str | None = None
    teacher: str | tuple[str, ...] | None = None
    metric: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 42

    def __post_init__(self) -> None:
        for key, valid in (("task", TASKS), ("metric", METRICS)):
            value = getattr(self, key)
            if value is not None and value not in valid:
                raise RecipeError(f"{key}: unknown {value!r}{nearest(value, valid)}")
        if (self.model is None) == (self.model_config is None):
            raise RecipeError("model: give either model (Hub id or folder) or model_config")
        if self.model_config is not None:
            try:
                make_config(self.model_config)
            except ValueError as error:
                raise RecipeError(str(error)) from error
        if not 0 <= self.seed < 2**32:
            raise RecipeError(f"seed: expected 0 to {2**32 - 1}, got {shown(self.seed)}")
        for key in ("model", "processor", "teacher"):
            for source in sources_of(getattr(self, key)):
                check_source(source, key)
        self._check_order()

    def _check_order(self) -> None:
        if not self.stages:
            raise RecipeError(f"stages: none given; expected some of {sorted(STAGES)}")
        if self.model_config is not None and not self.stages[0].takes_untrained:
            raise RecipeError(
                f"stages: the first is {self.stages[0].name!r}, but a model made from model_config "
                "is untrained: begin with `transfer` or `distil`"
            )
        for index, stage in enumerate(self.stages):
            place = f"stages[{index + 1}] {stage.name}"
            for source in stage.named_teachers:
                check_source(source, f"{place}.teacher")
            try:
                stage.check_place(self.stages[:index], bool(self.teacher))
            except ValueError as error:
                raise RecipeError(f"{place}: {error}") from error

    def to_yaml(self) -> str:
        """Return the recipe as YAML without its defaults; read back, it is equal."""
        values = _given(self)
        values["data"] = _given(self.data)
        values["stages"] = []
        for stage in self.stages:
            own = _given(stage)
            training = own.pop("training", {})
            values["stages"].append({stage.name: {**own, **training}})
        plain = json.loads(json.dumps(values))
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=None)


def _given(instance: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults."""
    given = {}
    for one in fields(instance):
        value = getattr(instance, one.name)
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if value != default:
            given[one.name] = value
    return given


def load_recipe(path: str | Path, arguments: Sequence[str] = ()) -> Recipe:
    """Read a recipe and the `--key value` pairs of the command line, and check both.

    Args:
        path: A YAML file.
        arguments: Such as `["--training.learning_rate", "3e-5", "--stages.prune.target.macs=0.4"]`.
            A stage is named by its name; if it occurs twice, by name and number:
            `stages.recover.2`.

    Raises:
        RecipeError: A key is unknown, a value is wrong, a file does not exist.
    """
    file = Path(path)
    if not file.is_file():
        raise RecipeError(f"no recipe {str(path)!r} in {Path.cwd()}")
    raw = mapping_at(read_yaml(file, str(path)), str(path))
    if not isinstance(raw.get("stages", []), list):
        example = "`- transfer: {num_train_epochs: 3}`"
        raise RecipeError(f"{path}: stages: expected a list, such as {example}")
    override(raw, arguments)
    try:
        return parse_recipe(raw)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def override(raw: dict[str, Any], arguments: Sequence[str]) -> None:
    """Set keys of a recipe that YAML has read by the `--key value` pairs of the command line.

    Raises:
        RecipeError: They are not pairs, or name a stage that the recipe does not have.
    """
    for key, value in _pairs(arguments):
        _override(raw, key.split("."), value, key)


def parse_recipe(raw: Mapping[str, Any]) -> Recipe:
    """Make a recipe of what YAML has read, and check it.

    Raises:
        RecipeError: A key is unknown, a value is wrong, a file does not exist.
    """
    values = dict(raw)
    stages = values.pop("stages", None) or []
    types = {name: hint for name, hint in types_of(Recipe).items() if name != "stages"}
    parsed = convert_all(
        {key: value for key, value in values.items() if key != "data"},
        {**types, "stages": Any},
        "",
    )
    if "data" in values:
        parsed["data"] = build(DataConfig, values["data"], "data")
    parsed["training"] = _training(
        mapping_at(values.get("training"), "training"), TrainingArguments, "training", {}
    )
    parsed["stages"] = tuple(
        _stage(one, f"stages[{number}]") for number, one in enumerate(stages, 1)
    )
    for name in ("task", "data", "output_dir"):
        if name not in parsed:
            raise RecipeError(f"{name}: missing")
    return Recipe(**parsed)


def _stage(raw: Any, place: str) -> Stage:
    name, settings = _name_and_settings(raw, place)
    if name not in STAGES:
        raise RecipeError(f"{place}: unknown stage {name!r}{nearest(name, STAGES)}")
    cls, place = STAGES[name], f"{place} {name}"
    if cls.arguments is None:
        return build(cls, settings, place)
    own = {f.name for f in fields(cls)} - {"training"}
    values = {key: value for key, value in settings.items() if key in own}
    rest = {key: value for key, value in settings.items() if key not in own}
    training = _training(rest, cls.arguments, place, dict.fromkeys(own, Any))
    return build(cls, {**values, "training": training}, place)


def _training(
    values: Mapping[str, Any], cls: type, place: str, own: Mapping[str, Any]
) -> dict[str, Any]:
    for key in values:
        if key in SET_ELSEWHERE:
            raise RecipeError(f"{join(place, key)}: cannot be set here: {SET_ELSEWHERE[key]}")
    return convert_all(values, {**types_of(cls), **own}, place)


def _name_and_settings(raw: Any, place: str) -> tuple[str, dict[str, Any]]:
    if isinstance(raw, str):
        return raw, {}
    if isinstance(raw, Mapping) and len(raw) == 1:
        name, settings = next(iter(raw.items()))
        return str(name), mapping_at(settings, f"{place} {name}")
    raise RecipeError(f"{place}: expected one stage, such as `prune: {{…}}`, got {raw!r}")


def _pairs(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    pairs, rest = [], list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--"):
            raise RecipeError(f"command line: expected --key value, got {key!r}")
        key, equals, text = key[2:].partition("=")
        if not equals:
            if not rest:
                raise RecipeError(f"command line: --{key} needs a value")
            text = rest.pop(0)
        pairs.append((key, read_yaml(text, f"command line: --{key} {shown(text)}")))
    return pairs


def _override(raw: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    node = raw
    if path[0] == "stages" and len(path) > 1:
        node, path = _find_stage(raw, path, key)
    for part in path[:-1]:
        if node.get(part) is None:
            node[part] = {}
        if not isinstance(node[part], dict):
            raise RecipeError(f"command line: --{key}: {part!r} is {node[part]!r}, it has no keys")
        node = node[part]
    node[path[-1]] = value


def _find_stage(raw: dict[str, Any], path: list[str], key: str) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of the stage that a dotted path names, and the rest of the path."""
    stages = raw.get("stages") or []
    named = [_name_and_settings(one, f"stages[{i}]") for i, one in enumerate(stages, 1)]
    found = [i for i, (name, _) in enumerate(named) if name == path[1]]
    if not found:
        hint = nearest(path[1], [name for name, _ in named])
        raise RecipeError(f"command line: --{key}: the recipe has no stage {path[1]!r}{hint}")
    rest = path[2:]
    number = 1
    if rest and rest[0].isdigit():
        number, rest = int(rest[0]), rest[1:]
    elif len(found) > 1:
        options = [f"stages.{path[1]}.{i}" for i in range(1, len(found) + 1)]
        raise RecipeError(f"command line: --{key}: there are {len(found)}; use one of {options}")
    if not rest or not 1 <= number <= len(found):
        raise RecipeError(
            f"command line: --{key}: expected stages.{path[1]}.KEY, or a number from 1 to "
            f"{len(found)} before it"
        )
    name, settings = named[found[number - 1]]
    stages[found[number - 1]] = {name: settings}
    return settings, rest
