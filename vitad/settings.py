"""Settings of a method: a frozen dataclass, whose fields are what papermill and `--set` may change."""

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from vitad.errors import UserError, unknown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")

# What separates pairs in a text. It stands before a `key=`, so that a value may hold blanks, as in blocks=(4, 6).
SEPARATOR = re.compile(r"[;\s]+(?=\w+\s*=)")


def resolve(
    cls: type[S], presets: Mapping[str, Mapping[str, Any]], preset: str, overrides: Mapping[str, Any] | None = None
) -> S:
    """Make the settings of a preset, with the user's overrides on top.

    Parameters
    ----------
    cls : dataclass
        Its defaults are the paper's settings.
    presets : {name: {field: value}}
        Differences from the defaults.
    preset : str
        One of the names.
    overrides : {field: value}, optional
        Values may be strings, as a command line gives them.

    Raises
    ------
    UserError
        The preset or a field is unknown (the nearest is named), or a value has the wrong type or is out of range.
    """
    if preset not in presets:
        raise unknown("preset", preset, presets)
    types = get_type_hints(cls)
    values = {}
    for key, value in (overrides or {}).items():
        if key not in types:
            raise unknown("setting", key, types)
        values[key] = _convert(key, value, types[key])
    settings = replace(cls(), **{**presets[preset], **values})
    _check(settings)
    return settings


def parse_overrides(given: dict[str, Any] | Sequence[str] | str | None) -> dict[str, Any]:
    """Read the overrides of a notebook, of papermill or of the command line.

    Parameters
    ----------
    given : dict, list of str, str or None
        A dict is returned as it is. A list holds `key=value` pairs. A text holds such pairs, separated by blanks,
        newlines or `;`, or a dict in JSON or Python: papermill's `-p overrides TEXT` can give nothing else.

    Returns
    -------
    dict
        Keys and values; the values of `key=value` pairs are strings.

    Raises
    ------
    UserError
        `given` is none of these, or a pair has no value.

    Examples
    --------
    >>> parse_overrides(["lr=1e-4", "epochs=3"])
    {'lr': '1e-4', 'epochs': '3'}
    >>> parse_overrides("lr=1e-4 blocks=4,6,8")
    {'lr': '1e-4', 'blocks': '4,6,8'}
    >>> parse_overrides('{"lr": 1e-4}')
    {'lr': 0.0001}
    """
    if given is None:
        return {}
    if isinstance(given, dict):
        return given
    if isinstance(given, str):
        text = given.strip("; \t\r\n")
        if text.startswith("{"):
            return _parse_dict(text)
        given = SEPARATOR.split(text) if text else []
    if not isinstance(given, (list, tuple)):
        raise UserError(f"overrides {given!r} have no keys. Write them as {{key: value}}.")
    overrides = {}
    for pair in given:
        key, equals, value = str(pair).partition("=")
        if not equals:
            raise UserError(f"setting '{pair}' has no value. Write it as key=value.")
        overrides[key.strip()] = value.strip()
    return overrides


def _parse_dict(text: str) -> dict[str, Any]:
    """A dict written in JSON or as a Python literal."""
    value = None
    try:
        value = json.loads(text)
    except ValueError:
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = ast.literal_eval(text)
    if not isinstance(value, dict):
        raise UserError(f"""overrides {text!r} cannot be read. Write them as {{"lr": 1e-4}} or as lr=1e-4.""")
    return value


def as_json(settings: "DataclassInstance") -> dict[str, Any]:
    """The settings as a dict that JSON can hold."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def _convert(key: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`, an int, float, bool, str, Literal, `tuple[int, ...]` or one of these `| None`."""
    wrong = UserError(f"setting {key}={value!r} has the wrong type: expected {_describe(kind)}.")
    if get_origin(kind) is UnionType:
        if value is None or value == "None":
            return None
        (kind,) = (k for k in get_args(kind) if k is not NoneType)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise unknown(f"value for setting {key}:", value, get_args(kind))
        return value
    if get_origin(kind) is tuple:
        items = value.strip("()[] ").split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise wrong
        return tuple(_convert(key, item, get_args(kind)[0]) for item in items if item != "")
    if kind is bool:
        known = {"true": True, "1": True, "false": False, "0": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in known:
            return known[value.lower()]
        raise wrong
    if isinstance(value, bool) or (kind is str and not isinstance(value, str)):
        raise wrong
    try:
        converted = kind(value)
    except (TypeError, ValueError, OverflowError):  # the last for int(inf)
        raise wrong from None
    if kind is int and isinstance(value, float) and value != converted:
        raise wrong
    return converted


def _describe(kind: Any) -> str:
    """A type in plain words."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return words.get(kind, str(kind).replace("...", "more"))


def _check(settings: "DataclassInstance") -> None:
    """Check the ranges that hold for every method; a method checks its own when it is made."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        values = value if isinstance(value, tuple) else (value,)
        numbers = [v for v in values if isinstance(v, (int, float))]
        if not all(math.isfinite(v) and v >= 0 for v in numbers):
            raise UserError(f"setting {field.name}={value} is out of range: it cannot be negative, infinite or NaN.")
        if field.name in ("image_size", "epochs", "batch_size") and value < 1:
            raise UserError(f"setting {field.name}={value} is out of range: it has to be at least 1.")
        if field.name == "val_fraction" and value >= 1:
            raise UserError(f"setting val_fraction={value} is out of range: it has to be below 1.")
