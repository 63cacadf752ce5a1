"""Prompts, parsed once, which may change while an image is drawn, in A1111's notation.

  [a:b:0.5]  a in the first half of the steps, then b; [a:b:5] a in the first 5 steps, then b
  [a:0.3]    nothing, then a            [a::0.3]  a, then nothing
  [a|b|c]    a, b, c, a, … in turn, a step each

A number with a point is a fraction of the steps, rounded down; one without is a number of steps. They may stand inside
each other and around emphasis. What has none of these forms is left as it is, as A1111 does. But where A1111 then gives
up on the whole prompt (a | outside of brackets), here that is an ordinary character.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from ldm.errors import ConfigError
from ldm.prompts.emphasis import BREAK, MAX_DEPTH, Piece, read

TOKEN = re.compile(r"\\.|[^\\\[\]():|]+|.", re.DOTALL)
MARK = re.compile(r"[\\\[\]()]|\b(BREAK|AND)\b")  # without any of these a prompt is words alone
NUMBER = re.compile(r"[+-]?(\d{1,9}(\.\d*)?|\.\d+)")
CLOSES = {"(": ")", "[": "]"}


@dataclass(frozen=True)
class Choice:
    """One of several texts, by the step."""

    options: list[Nodes]
    when: str | None  # the number of [a:b:when]; None: in turn

    def first_of_second(self, n: int) -> int:
        """The step from which [a:b:when] is b."""
        return int(float(self.when) * n) if "." in self.when else int(self.when)

    def at(self, step: int, n: int) -> Nodes:
        if self.when is None:
            return self.options[step % len(self.options)]
        return self.options[step >= self.first_of_second(n)]


Nodes = list[str | Choice]


@dataclass
class Frame:
    """An open bracket and what has come since, parted at its own : and |."""

    bracket: str = ""
    parts: list[Nodes] = field(default_factory=lambda: [[]])
    separators: list[str] = field(default_factory=list)

    def literally(self) -> Nodes:
        """Everything as it is written."""
        nodes: Nodes = [self.bracket, *self.parts[0]]
        for separator, part in zip(self.separators, self.parts[1:]):
            nodes += [separator, *part]
        return nodes

    def closed(self) -> Nodes | None:
        """What the bracket means now that it ends; None where it has no form that means anything."""
        form = "".join(self.separators)
        if self.bracket == "(":
            return [*self.literally(), ")"] if form in ("", ":") else None
        if form in (":", "::") and (when := _number(self.parts[-1])):
            before = self.parts[0] if form == "::" else []
            return [Choice([before, self.parts[-2]], when)]
        if form and not form.strip("|"):
            return [Choice(self.parts, None)]
        return None if form else [*self.literally(), "]"]


class Text(NamedTuple):
    """A prompt's text at one step."""

    written: str  # with its emphasis
    pieces: tuple[Piece, ...]

    @property
    def plain(self) -> str:
        """The words alone."""
        return " ".join(piece.text for piece in self.pieces if piece is not BREAK)


@dataclass(frozen=True)
class Prompt:
    """A prompt whose grammar is right. `parse` makes it; two of the same text are equal."""

    text: str
    remarks: tuple[str, ...] = field(default=(), compare=False)  # brackets that are not what they look like
    _nodes: Nodes = field(default_factory=list, compare=False, repr=False)
    _read: dict[str, tuple[Piece, ...]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def parse(cls, text: str, where: str = "prompt") -> Prompt:
        """Raises ConfigError, of any of the texts that it can become, as `emphasis.read` does. Remarks: a line for each
        bracket that is not closed, and for each [a:b] or [a|b:1], which only look like prompt editing."""
        if not MARK.search(text):
            return cls(text, (), [text], {text: (Piece(text, 1.0),)})
        nodes, lines = _tree(text, where)
        remarks, known = _read_all(nodes, lines, where)
        return cls(text, remarks, nodes, known)

    def at_steps(self, n: int) -> list[tuple[int, Text]]:
        """The texts over `n` steps: (first step, text), the first one for step 0, neighbours differing."""
        if not MARK.search(self.text):
            return [(0, Text(self.text, self._read[self.text]))]
        return self._chosen_at_steps(n)

    def _chosen_at_steps(self, n: int) -> list[tuple[int, Text]]:
        choices = _choices(self._nodes)
        starts = {0, *(choice.first_of_second(n) for choice in choices if choice.when is not None)}
        steps = range(n) if any(choice.when is None for choice in choices) else sorted(s for s in starts if 0 <= s < n)
        texts: list[tuple[int, Text]] = []
        for step in steps:
            written = "".join(_chosen(self._nodes, lambda choice: choice.at(step, n)))  # noqa: B023, used at once
            if not texts or written != texts[-1][1].written:
                if written not in self._read:
                    self._read[written] = tuple(read(written, "prompt")[0])
                texts.append((step, Text(written, self._read[written])))
        return texts


def _read_all(nodes: Nodes, remarks: list[str], where: str) -> tuple[tuple[str, ...], dict[str, tuple[Piece, ...]]]:
    """The remarks on every text that a prompt can become, and the texts' pieces."""
    known: dict[str, tuple[Piece, ...]] = {}
    for part in [nodes, *(option for choice in _choices(nodes) for option in choice.options)]:
        written = "".join(_chosen(part, lambda choice: []))
        pieces, lines = read(written, where)
        known[written] = tuple(pieces)
        remarks += lines
    return tuple(remarks), known


def _tree(prompt: str, where: str) -> tuple[Nodes, list[str]]:
    """The prompt as texts and choices, and a line for each bracket that only looks like a choice."""
    frames, lines = [Frame()], []
    for token in TOKEN.findall(prompt):
        top = frames[-1]
        if token in CLOSES:
            frames.append(Frame(token))
            if len(frames) > MAX_DEPTH + 1:
                raise ConfigError(f"brackets are nested more than {MAX_DEPTH} deep", where=where)
        elif token in CLOSES.values():
            nodes = top.closed() if CLOSES.get(top.bracket) == token else None
            if nodes is not None:
                frames.pop()
                frames[-1].parts[-1] += nodes
                continue
            if top.bracket == "[" and token == "]":
                shown = "".join(node if isinstance(node, str) else "[…]" for node in top.literally())
                lines.append(f"{shown + ']'!r:.60} is neither [a:b:0.5] nor [a|b], and is taken as emphasis")
            frames = [_flat(frames, token)]  # what holds a loose bracket is no choice: all that is open is mere text
        elif token in (":", "|") and len(frames) > 1:
            top.separators.append(token)
            top.parts.append([])
        else:
            top.parts[-1].append(token)
    return _flat(frames).parts[0], lines


def _flat(frames: list[Frame], *more: str) -> Frame:
    """The outermost frame, with all others written out at its end."""
    root, *others = frames
    for frame in others:
        root.parts[0] += frame.literally()
    root.parts[0] += more
    return root


def _number(nodes: Nodes) -> str | None:
    text = "".join(node if isinstance(node, str) else "[" for node in nodes).strip()
    return text if NUMBER.fullmatch(text) else None


def _choices(nodes: Nodes) -> list[Choice]:
    """All of them, those inside others too."""
    choices = [node for node in nodes if isinstance(node, Choice)]
    for choice in choices:  # grows meanwhile
        choices += [node for option in choice.options for node in option if isinstance(node, Choice)]
    return choices


def _chosen(nodes: Nodes, choose: Callable[[Choice], Nodes]) -> list[str]:
    texts = []
    for node in nodes:
        texts += [node] if isinstance(node, str) else _chosen(choose(node), choose)
    return texts
