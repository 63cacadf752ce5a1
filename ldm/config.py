"""Frozen, validated settings: dataclasses built from mappings; an unknown key is an error."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ldm.errors import ConfigError, nearest
from ldm.errors import require as require  # for the checks of settings classes

T = TypeVar("T")


def build(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """A frozen dataclass from a mapping, checked field by field.

    Accepts bool, int, float (an int fits), str, tuple[x, ...], dict[str, x], Literal, nested dataclasses and unions
    with None. Raises ConfigError naming the key for an unknown name (with the nearest), a missing or mistyped value.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"expected a group of settings, got {_shown(mapping)}", where=where or cls.__name__)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in mapping:
        if key not in fields:
            raise ConfigError(f"unknown setting {_shown(key)}", where=where or None, hint=nearest(_word(key), fields))
    values = {k: _convert(hints[k], v, f"{where}.{k}" if where else k) for k, v in mapping.items()}
    for name, field in fields.items():
        if name in values or field.default is not dataclasses.MISSING:
            continue
        if field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"setting {name!r} is missing", where=where or None)
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = [a for a in args if a is not type(None)]
        return _convert(hint, value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{_shown(value)} is not allowed", where=where, hint=nearest(_word(value), args))
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise ConfigError(f"expected {len(kinds)} values, got {len(value)}", where=where)
        return tuple(_convert(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value)))
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an int beyond 1.8e308
            number = math.inf
        if not math.isfinite(number):
            raise ConfigError(f"{_shown(value)} is not a finite number", where=where)
        return number
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    name = getattr(hint, "__name__", None) if origin is None else None
    raise ConfigError(f"expected {name or hint}, got {_shown(value)}", where=where)


def _shown(value: Any) -> str:
    """A value as an error shows it: short, whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # an int of more than 4300 digits
        text = f"an {type(value).__name__} of too many digits"
    return text if len(text) <= 100 else f"{text[:100]}…"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else _shown(value)
