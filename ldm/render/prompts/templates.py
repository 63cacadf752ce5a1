"""Prompt templates in the manner of sd-dynamic-prompts, drawn by a seed: the same text on every machine.

{a|b}  {2$$a|b|c}  {1-2$$ and $$a|b|c}  {0.5::a|b}  nested  __wildcard__  (a line of FOLDER/wildcard.txt; subfolders,
spaces and * are allowed, lines may be templates). A backslash before { } | __ $$ :: makes them text.

A template is read as a list of nodes: a text, a Choice or a Wildcard.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ldm.errors import ConfigError, nearest
from ldm.files import format_bytes
from ldm.pipeline.keywords import MAX_PROMPT

MAX_DEPTH = 20  # of braces in braces, and of wildcards in wildcards
MAX_PICKS = 10_000  # in one prompt
MAX_FILE = 16 * 10**6  # bytes of a wildcard file
JOINER = ", "

_TOKEN = re.compile(
    r"(?P<escape>\\\\|\\(?:\$\$|::|__|[{}|]))|(?P<variable>\$\{)|(?P<mark>[{}|])"
    r"|__(?P<wildcard>(?:[^\W_]|\*)[\w.*/-]*?)(?P<call>\([^()]*\))?__"
    # file names of any other characters, where the underscores do not stand within a word
    r"|(?<![^\W_])__(?P<file>[^\W_](?:[^\n{}|$\\_]|_(?!_)){0,200}?)(?<!\s)__(?![^\W_])"
)
SIGNS = re.compile(r"[{}\\]|__")  # a text without any of these is no template
_HEAD = re.compile(r"\s*(?P<low>\d{0,4})(?P<dash>-?)(?P<high>\d{0,4})\$\$(?:(?P<joiner>[^$|{}\\]*)\$\$)?")
_WEIGHT = re.compile(r"\s*(\d{1,12}(?:\.\d{0,12})?|\.\d{1,12})::")


@dataclass(frozen=True)
class Wildcard:
    name: str


@dataclass(frozen=True)
class Choice:
    low: int | None  # how many are taken; None: as few or many as can be
    high: int | None
    joiner: str | None  # None: {a|b}, one as it stands
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Option:
    weight: float
    nodes: tuple[str | Choice | Wildcard, ...]


class Wildcards:
    """The wildcard files of a folder, each read once."""

    def __init__(self, folder: str | os.PathLike | None = None):
        self._folder = None if folder is None else Path(folder)
        self._read: dict[str, tuple[Option, ...]] = {}
        if self._folder is not None and not self._folder.is_dir():
            raise ConfigError("is no folder", where=self._folder, hint="give the folder of the wildcard files")

    def options(self, name: str) -> tuple[Option, ...]:
        """The lines of name.txt, or of all files that a * fits. Raises ConfigError."""
        if name not in self._read:
            self._read[name] = tuple(option for path in self._files(name) for option in _options_of(path, name))
            if not self._read[name]:
                raise ConfigError(f"the wildcard file of __{name}__ is empty", where="prompt")
        return self._read[name]

    def _files(self, name: str) -> list[Path]:
        if self._folder is None:
            hint = "give --wildcards FOLDER, or write \\__ for text"
            raise ConfigError(f"__{name}__ names a wildcard, but no folder to look in", where="prompt", hint=hint)
        parts = name.split("/")
        if ".." in parts or "" in parts or len(name) > 200:
            raise ConfigError(f"__{name:.80}__ is no name of a file in the wildcard folder", where="prompt")
        pattern = f"{name}.txt".replace("[", "[[]")
        matches = sorted(self._folder.glob(pattern)) if "*" in name else [self._folder / f"{name}.txt"]
        files = [path for path in matches if path.is_file()] or self._spelt_alike(name)
        if not files:
            names = [self._name(path) for path in self._folder.rglob("*.txt")]
            hint = nearest(name, names)
            hint = hint if hint.startswith("did") else f"put {name}.txt there"
            raise ConfigError(f"there is no wildcard {name} in {self._folder}", where="prompt", hint=hint)
        return files

    def _spelt_alike(self, name: str) -> list[Path]:
        """The one file whose name differs in case or in Unicode's form alone, as Macs and keyboards make it."""
        plain = _plain(name)
        alike = [path for path in self._folder.rglob("*.txt") if _plain(self._name(path)) == plain]
        return alike if len(alike) == 1 else []

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).with_suffix("").as_posix()


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


NO_WILDCARDS = Wildcards()


def _options_of(path: Path, name: str) -> list[Option]:
    try:
        with path.open("rb") as handle:
            data = handle.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise ConfigError(f"is larger than {format_bytes(MAX_FILE)}", where=path)
        lines = data.decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read ({error})", where=path) from None
    options = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            weight, text = _weight(line.strip())
            try:
                options.append(Option(weight, template(text)))
            except ConfigError as error:
                raise ConfigError(f"__{name}__: {error.what}", where=f"{path}:{number}", hint=error.hint) from None
    return options


# Reading


@lru_cache(maxsize=256)
def template(text: str) -> tuple[str | Choice | Wildcard, ...]:
    """A template as nodes. Raises ConfigError for braces that do not match and what is not supported."""
    nodes, end = _nodes(text, 0, 0)
    if end < len(text):
        raise ConfigError(f"a }} without a {{ at character {end + 1}", where="prompt", hint="write \\} for text")
    return nodes


def _nodes(text: str, position: int, depth: int) -> tuple[tuple[str | Choice | Wildcard, ...], int]:
    """(the nodes from `position` on, where they end): before } or, within braces, before |."""
    nodes, plain = [], []
    while match := _TOKEN.search(text, position):
        plain.append(text[position : match.start()])
        kind, position = match.lastgroup, match.end()
        if kind == "escape":
            plain.append(match[0] if match[0] == "\\\\" else match[0][1:])
        elif kind == "variable" or match["call"]:
            hint = "write the words themselves, or \\{ for text" if kind == "variable" else "write \\__ for text"
            raise ConfigError(f"variables are not supported: {match[0]:.40}", where="prompt", hint=hint)
        elif kind in ("wildcard", "file"):
            nodes += ["".join(plain), Wildcard(match[kind])]
            plain = []
        elif match[0] == "{":
            choice, position = _choice(text, position, depth + 1)
            nodes += ["".join(plain), choice]
            plain = []
        elif match[0] == "}" or depth:
            return (*(node for node in [*nodes, "".join(plain)] if node != ""),), match.start()
        else:
            plain.append("|")
    nodes.append("".join(plain) + text[position:])
    return (*(node for node in nodes if node != ""),), len(text)


def _choice(text: str, position: int, depth: int) -> tuple[Choice, int]:
    """(the choice whose { stands before `position`, where it ends)."""
    start = position
    if depth > MAX_DEPTH:
        raise ConfigError(f"more than {MAX_DEPTH} braces in each other", where="prompt")
    low = high = 1
    joiner = None
    head = _HEAD.match(text, position)
    if head and (head["low"] or head["dash"]):
        low = int(head["low"]) if head["low"] else None
        high = (int(head["high"]) if head["high"] else None) if head["dash"] else low
        if low is not None and high is not None and low > high:
            raise ConfigError(f"{low}-{high}$$ is no range", where="prompt")
        joiner = JOINER if head["joiner"] is None else head["joiner"]
        position = head.end()
    options = []
    while True:
        weight = _WEIGHT.match(text, position)
        nodes, position = _nodes(text, weight.end() if weight else position, depth)
        options.append(Option(float(weight[1]) if weight else 1.0, nodes))
        if position == len(text):
            raise ConfigError(f"the {{ at character {start} is not closed", where="prompt", hint="write \\{ for text")
        position += 1
        if text[position - 1] == "}":
            break
    if not sum(option.weight for option in options):
        raise ConfigError("every option has the weight 0", where="prompt")
    return Choice(low, high, joiner, tuple(options)), position


def _weight(text: str) -> tuple[float, str]:
    match = _WEIGHT.match(text)
    return (float(match[1]), text[match.end() :]) if match else (1.0, text)


# Drawing


class _Draws:
    """Numbers in [0, 1) from sha256 of seed, purpose and a counter: no library's generator is trusted to stay."""

    def __init__(self, seed: int, purpose: str):
        self._start, self._count = f"{seed}:{purpose}:", 0

    def next(self) -> float:
        self._count += 1
        if self._count > MAX_PICKS:
            raise ConfigError(f"more than {MAX_PICKS:,} choices in one prompt", where="prompt")
        digest = hashlib.sha256(f"{self._start}{self._count}".encode()).digest()
        return (int.from_bytes(digest[:8], "big") >> 11) / 2**53

    def pick(self, options: Sequence[Option]) -> int:
        """The number of one option, by weight."""
        point = self.next() * math.fsum(option.weight for option in options)
        for i, option in enumerate(options):
            point -= option.weight
            if point < 0:
                return i
        return max(i for i, option in enumerate(options) if option.weight)  # rounding


def expand(text: str, seed: int, wildcards: Wildcards, purpose: str = "prompt") -> str:
    """`text` with every choice made by `seed`; `purpose` keeps the draws of prompt and negative prompt apart.

    Raises ConfigError for a bad template, a wildcard that is not there, endless wildcards, or a result of more than
    100,000 characters.
    """
    nodes = template(text)
    if all(isinstance(node, str) for node in nodes):
        return "".join(nodes)
    result = _drawn(nodes, _Draws(seed, purpose), wildcards, ())
    if len(result) > MAX_PROMPT:
        raise ConfigError(f"expands to more than {MAX_PROMPT:,} characters", where="prompt")
    return result


def _drawn(nodes: Sequence, draws: _Draws, wildcards: Wildcards, inside: tuple[str, ...]) -> str:
    """The text of nodes; `inside` are the wildcards on the way here."""
    parts, length = [], 0
    for node in nodes:
        if isinstance(node, str):
            parts.append(node)
        elif isinstance(node, Wildcard):
            options, within = _entered(node, wildcards, inside)
            parts.append(_drawn(options[draws.pick(options)].nodes, draws, wildcards, within))
        else:
            parts.append(_chosen(node, draws, wildcards, inside))
        length += len(parts[-1])
        if length > MAX_PROMPT:
            raise ConfigError(f"expands to more than {MAX_PROMPT:,} characters", where="prompt")
    return "".join(parts)


def _entered(
    node: Wildcard, wildcards: Wildcards, inside: tuple[str, ...]
) -> tuple[tuple[Option, ...], tuple[str, ...]]:
    if len(inside) >= MAX_DEPTH:
        chain = " > ".join([*inside[-3:], node.name])
        raise ConfigError(f"more than {MAX_DEPTH} wildcards in each other (… {chain})", where="prompt")
    return wildcards.options(node.name), (*inside, node.name)


def _chosen(choice: Choice, draws: _Draws, wildcards: Wildcards, inside: tuple[str, ...]) -> str:
    options, within = list(choice.options), inside
    lone = options[0].nodes if len(options) == 1 else ()
    if choice.joiner is not None and len(lone) == 1 and isinstance(lone[0], Wildcard):  # {2$$__w__}: two lines of w
        options, within = _entered(lone[0], wildcards, inside)
        options = list(options)
    possible = [option for option in options if option.weight]
    low = min(1 if choice.low is None else choice.low, len(possible))
    high = min(len(possible) if choice.high is None else choice.high, len(possible))
    number = low + int(draws.next() * (high - low + 1)) if high > low else high
    texts = []
    for _ in range(number):
        option = possible.pop(draws.pick(possible))
        text = _drawn(option.nodes, draws, wildcards, within)
        texts.append(text if choice.joiner is None else text.strip())
    return (choice.joiner or "").join(texts)
