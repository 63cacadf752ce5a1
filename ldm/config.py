"""Frozen, validated settings: dataclasses built from YAML, TOML or JSON; an unknown key is an error."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ldm.errors import ConfigError, nearest

T = TypeVar("T")


def load(path: str | Path) -> dict[str, Any]:
    """Read one settings file (.yaml .yml .toml .json) into a dict.

    Raises ConfigError with the line for bad syntax, duplicate keys and YAML aliases (they can grow without bound).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("no such settings file", where=path, todo="give a packaged name or a path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read ({error})", where=path) from None
    readers = {".yaml": _yaml, ".yml": _yaml, ".toml": _toml, ".json": _json}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"unknown settings format {path.suffix!r}", where=path, todo="use .yaml, .toml or .json")
    value = readers[path.suffix.lower()](text, path)
    value = {} if value is None else value  # an empty file
    if not isinstance(value, dict):
        raise ConfigError("the settings must be a mapping of names to values", where=path)
    return value


def _yaml(text: str, path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.events.AliasEvent):
                raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=self.peek_event().start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key) for key, _ in node.value]
            for key, (key_node, _) in zip(keys, node.value):
                if keys.count(key) > 1:
                    raise yaml.MarkedYAMLError(problem=f"duplicate key {key!r}", problem_mark=key_node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        raise ConfigError(error.problem or "bad YAML", where=where) from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"bad YAML ({error})", where=path) from None


def _toml(text: str, path: Path) -> Any:
    import tomllib

    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"bad TOML ({error})", where=path) from None


def _json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(error.msg, where=f"{path}:{error.lineno}:{error.colno}") from None
    except RecursionError:
        raise ConfigError("nested too deeply", where=path) from None


def override(mapping: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of `mapping` with dotted `KEY=VALUE` assignments applied; values are read as YAML scalars or lists."""
    import copy

    result = copy.deepcopy(dict(mapping))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"{assignment!r} is not KEY=VALUE", todo="write for example steps=1000")
        *parents, leaf = key.split(".")
        target = result
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{parent!r} holds a value, not a group of settings", where=key)
        target[leaf] = _scalar(text, key)
    return result


def _scalar(text: str, key: str) -> Any:
    value = _yaml(text, Path(key)) if text.strip() else ""
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a string
        except ValueError:
            return value
    return value


def build(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """A frozen dataclass from a mapping, checked field by field.

    Accepts bool, int, float (an int fits), str, tuple[x, ...], dict[str, x], Literal, nested dataclasses and unions
    with None. Raises ConfigError naming the key for an unknown name (with the nearest), a missing or mistyped value.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"expected a group of settings, got {mapping!r}", where=where or cls.__name__)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in mapping:
        if key not in fields:
            raise ConfigError(f"unknown setting {key!r}", where=where or None, todo=nearest(str(key), fields))
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
            raise ConfigError(f"{value!r} is not allowed", where=where, todo=nearest(str(value), args))
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
        if not math.isfinite(value):
            raise ConfigError(f"{value} is not a finite number", where=where)
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    name = getattr(hint, "__name__", None) if origin is None else None
    raise ConfigError(f"expected {name or hint}, got {value!r}", where=where)


def require(condition: bool, what: str, where: str) -> None:
    """Raise ConfigError unless `condition`; for the range checks in a settings class's __post_init__."""
    if not condition:
        raise ConfigError(what, where=where)
