"""Settings read from YAML, TOML or JSON files and from KEY=VALUE, as mappings."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.errors import ConfigError


def load(path: str | Path) -> dict[str, Any]:
    """Read one settings file (.yaml .yml .toml .json) into a dict.

    Raises ConfigError with the place for bad syntax, duplicate keys and YAML aliases (they can grow without bound).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError("no such settings file", where=path, hint="give a packaged name or a path") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read ({error})", where=path) from None
    readers = {".yaml": _yaml, ".yml": _yaml, ".toml": _toml, ".json": _json}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"unknown settings format {path.suffix!r}", where=path, hint="use .yaml, .toml or .json")
    value = readers[path.suffix.lower()](text, path)
    value = {} if value is None else value  # an empty file
    if not isinstance(value, dict):
        raise ConfigError("the settings must be a mapping of names to values", where=path)
    return value


def _yaml(text: str, path: Path | str) -> Any:
    import yaml

    try:
        return yaml.load(text, _yaml_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        raise ConfigError(error.problem or "bad YAML", where=where) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        where = f"{path}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        raise ConfigError(f"the character {chr(error.character)!r} is not allowed", where=where) from None
    except RecursionError:
        raise ConfigError("nested too deeply", where=path) from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:  # the last three: odd !!tags
        raise ConfigError(f"bad YAML ({error})", where=path) from None


@functools.cache
def _yaml_loader() -> type:
    """YAML 1.1 as settings need it: 1e-3 is a number, a date is text; no aliases, no key twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012, as in the base class
            first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":timestamp")]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def compose_node(self, parent, index):
            if self.check_event(yaml.events.AliasEvent):
                raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=self.peek_event().start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                key = self.construct_object(key_node)
                if isinstance(key, Hashable) and key in seen:
                    raise yaml.MarkedYAMLError(problem=f"duplicate key {key!r}", problem_mark=key_node.start_mark)
                seen |= {key} if isinstance(key, Hashable) else set()
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+\Z")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def _toml(text: str, path: Path) -> Any:
    import tomllib

    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError("nested too deeply", where=path) from None
    except ValueError as error:  # TOMLDecodeError is one, and a number of too many digits another
        place = re.search(r" \(at line (\d+), column (\d+)\)$", str(error))
        where = f"{path}:{place[1]}:{place[2]}" if place else path
        raise ConfigError(f"bad TOML ({str(error)[: place.start() if place else None]})", where=where) from None


def _json(text: str, path: Path) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: distinct(pairs, path))
    except json.JSONDecodeError as error:
        raise ConfigError(error.msg, where=f"{path}:{error.lineno}:{error.colno}") from None
    except ValueError as error:  # a number of too many digits
        raise ConfigError(f"bad JSON ({error})", where=path) from None
    except RecursionError:
        raise ConfigError("nested too deeply", where=path) from None


def distinct(pairs: list[tuple[str, Any]], where: Path | None = None) -> dict[str, Any]:
    """The members of a JSON object. Raises ConfigError for a key that is there twice."""
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ConfigError(f"duplicate key {twice!r:.80}", where=where)
    return members


def override(mapping: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of `mapping` with dotted `KEY=VALUE` assignments applied. Raises ConfigError."""
    import copy

    result = copy.deepcopy(dict(mapping))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"{assignment!r} is not KEY=VALUE", hint="write for example steps=1000")
        *parents, leaf = key.split(".")
        target = result
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{parent!r} holds a value, not a group of settings", where=key)
        target[leaf] = parse_scalar(text, key)
    return result


def parse_scalar(text: str, key: str) -> Any:
    """The value of `key` on the command line: a YAML scalar or list. Raises ConfigError for bad YAML."""
    text = text.strip()
    if not text or (" #" in text and text[0] not in "'\"[{"):  # on the command line, # starts no comment
        return text
    return _yaml(text, key)
