"""Check the plain values that YAML reads against the types of a dataclass."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


class RecipeError(ValueError):
    """A recipe has a wrong key or value; the message names its place and the nearest fix."""


class _UniqueKeys(yaml.SafeLoader):
    """Reads YAML whose mappings have each key once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"the key {key.value!r} is there twice, again in line {line}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(source: str | Path, place: str) -> Any:
    """Read YAML from a file or a text.

    Args:
        source: A `Path`, or the text itself.
        place: The name of the file or option in messages.

    Raises:
        RecipeError: It is not UTF-8 or not YAML, has a key twice, is nested too deep, or holds a
            number that is too long.
    """
    try:
        text = source if isinstance(source, str) else source.read_text(encoding="utf-8")
        return yaml.load(text, _UniqueKeys)
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: {error.reason} at byte {error.start}"
    except RecursionError:
        reason = "not a recipe: nested too deep"
    except (yaml.YAMLError, ValueError, OSError, TypeError) as error:
        reason = f"not valid YAML: {' '.join(str(error).split())}"
    raise RecipeError(f"{place}: {reason}")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `; did you mean …?` for the nearest valid name, or the list of all."""
    valid = list(valid)
    near = difflib.get_close_matches(str(name), valid, 1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; expected one of {sorted(valid)}" if len(valid) <= 20 else ""


def join(place: str, key: str) -> str:
    """Return the dotted path of a key."""
    return f"{place}.{key}" if place else key


def types_of(cls: type) -> dict[str, Any]:
    """Return the types of the fields that the constructor of a dataclass takes."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


def mapping_at(value: Any, place: str) -> dict[str, Any]:
    """Return a mapping as a dict with string keys; None as an empty one.

    Raises:
        RecipeError: The value is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RecipeError(f"{place or 'recipe'}: expected keys with values, got {shown(value)}")
    return {str(key): one for key, one in value.items()}


def convert_all(values: Mapping[str, Any], valid: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Convert each value to the type of its key in `valid`.

    Raises:
        RecipeError: A key is not in `valid`, or a value has another type.
    """
    for key in values:
        if key not in valid:
            raise RecipeError(f"{join(place, key)}: unknown key{nearest(key, valid)}")
    return {key: convert(value, valid[key], join(place, key)) for key, value in values.items()}


def build(cls: type[Any], values: Any, place: str) -> Any:
    """Make a dataclass from a mapping.

    Raises:
        RecipeError: A key is unknown or missing, a value has another type, or the dataclass raises
            `ValueError`.
    """
    converted = convert_all(mapping_at(values, place), types_of(cls), place)
    for field in fields(cls):
        required = field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in converted:
            raise RecipeError(f"{join(place, field.name)}: missing")
    try:
        return cls(**converted)
    except RecipeError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise RecipeError(f"{place}: {error}" if place else str(error)) from error


def convert(value: Any, hint: Any, place: str) -> Any:
    """Convert a value to the type `hint`.

    A float may be given as an int, or as a string such as `2e-5`, which YAML does not read as a
    number. A choice `no` may be given as false, as YAML reads `no`.

    Raises:
        RecipeError: The value has another type.
    """
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    names = [name for option in options for name in _choices(option)]
    for option in options:
        if option is str and names:
            continue  # transformers types its choices as `Choice | str`
        matched, result = _match(value, option, place)
        if matched:
            return result
    if names and isinstance(value, str):
        raise RecipeError(f"{place}: unknown {value!r}{nearest(value, names)}")
    wanted = " or ".join(_name(option) for option in options)
    raise RecipeError(f"{place}: expected {wanted}, got {shown(value)}")


def _match(value: Any, hint: Any, place: str) -> tuple[bool, Any]:
    """Return whether a value fits one type, and the value converted to it."""
    origin = get_origin(hint) or hint
    if hint is Any or (hint is type(None) and value is None):
        return True, value
    if origin is Literal or (isinstance(hint, type) and issubclass(hint, Enum)):
        choices = _choices(hint)
        value = "no" if value is False and "no" in choices else value
        return value in choices, value
    if hint is float:
        return _float(value)
    if hint in (int, bool, str):
        return type(value) is hint, value
    if origin in (list, tuple) and isinstance(value, list | tuple):
        inner = get_args(hint)[0] if get_args(hint) else Any
        items = [convert(one, inner, f"{place}[{i}]") for i, one in enumerate(value)]
        return True, origin(items)
    if isinstance(origin, type) and issubclass(dict, origin) and isinstance(value, Mapping):
        return True, dict(value)
    return False, value


def _float(value: Any) -> tuple[bool, Any]:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False, value
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return False, value
    return math.isfinite(number), number


def shown(value: Any) -> str:
    """Return a value in a message, on one line and not too long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that is too long"
    return text if len(text) <= 100 else f"{text[:100]}…"


def _choices(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [member.value for member in hint]
    return []


def _name(hint: Any) -> str:
    if choices := _choices(hint):
        return f"one of {choices}"
    origin = get_origin(hint) or hint
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    words |= {type(None): "nothing", list: "a list", tuple: "a list", dict: "keys with values"}
    return words.get(origin, "keys with values")
