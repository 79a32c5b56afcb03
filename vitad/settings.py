"""Settings of a method: one frozen dataclass, whose fields are what papermill and `--set` may change."""

import math
from dataclasses import asdict, fields, replace
from types import NoneType, UnionType
from typing import Literal, get_args, get_origin, get_type_hints

from vitad.errors import UserError, unknown


def resolve(cls, presets, preset, overrides=None):
    """Settings of a preset with the user's overrides on top.

    Args:
        cls: the dataclass, whose defaults are the paper's.
        presets: {name: {field: value}}, differences from the defaults.
        overrides: {field: value}; values may be strings, as a command line gives them.

    Raises:
        UserError: unknown preset or field (the nearest is named), value of a wrong type or out of range.
    """
    if preset not in presets:
        raise unknown("preset", preset, presets)
    types = get_type_hints(cls)
    values = {}
    for key, value in (overrides or {}).items():
        if key not in types:
            raise unknown("setting", key, types)
        values[key] = _convert(key, value, types[key])
    settings = replace(cls(), **presets[preset] | values)
    _check(settings)
    return settings


def parse_overrides(pairs):
    """`["lr=1e-4", "epochs=3"]` as a dict of strings. A dict, as papermill gives it, is handed through."""
    if isinstance(pairs, dict):
        return pairs
    if not isinstance(pairs, (list, tuple, type(None))):
        raise UserError(f"overrides {pairs!r} have no keys. Write them as {{key: value}}.")
    overrides = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"setting '{pair}' has no value. Write it as key=value.")
        overrides[key.strip()] = value.strip()
    return overrides


def as_json(settings):
    """The settings as a dict that JSON can hold."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()}


def _convert(key, value, kind):
    """`value` as `kind`, an int, float, bool, str, Literal, `tuple[int, ...]` or one of these `| None`."""
    wrong = UserError(f"setting {key}={value!r} has the wrong type: expected {_say(kind)}.")
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


def _say(kind):
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(
        kind, str(kind).replace("...", "more")
    )


def _check(settings):
    """Ranges that hold for every method; a method checks what is its own when it is made."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, (int, float))]
        if not all(math.isfinite(v) and v >= 0 for v in numbers):
            raise UserError(f"setting {field.name}={value} is out of range: it cannot be negative, infinite or NaN.")
        if field.name in ("image_size", "epochs", "batch_size") and value < 1:
            raise UserError(f"setting {field.name}={value} is out of range: it has to be at least 1.")
        if field.name == "val_fraction" and value >= 1:
            raise UserError(f"setting val_fraction={value} is out of range: it has to be below 1.")
