"""KEY=VALUE in the words of prompt lines: settings in place of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import ConfigError
from ldm.render.prompts.line_settings import WORDS, find_word, parse_settings, suggest_word
from ldm.render.prompts.setting_table import SETTINGS


@dataclass(frozen=True)
class Changes:
    """Settings in place of those of a source."""

    settings: Mapping[str, Any]
    names: frozenset[str]  # all that they replace: spacing=Automatic removes one and sets none

    @classmethod
    def read(cls, items: Sequence[str]) -> Changes:
        """From KEY=VALUE with the words of prompt lines. Raises ConfigError, with the nearest word."""
        pairs = []
        for item in items:
            word, equals, value = item.partition("=")
            if not equals or not word.strip():
                raise ConfigError(f"expected KEY=VALUE, got {item!r:.80}", where="--set")
            if find_word(word) is None:
                hint = suggest_word(word.strip()[:80]) or "see the words of prompt lines"
                raise ConfigError(f"unknown setting {word.strip()!r:.80}", where="--set", hint=hint)
            pairs.append((word.strip(), value))
        settings = parse_settings(pairs, Path())
        names = {WORDS.get(find_word(word), "") for word, _ in pairs}
        names = {name for given in names for name in (SETTINGS["size"].sets if given == "size" else (given,))}
        return cls(settings, frozenset(names | set(settings)))
