"""Lists of prompts with what each asks for, read from `docs/prompts/`, a file or Python.

A list is a text file: comment lines that begin with `#`, then one prompt a line in five columns between tabs: the
prompt; the objects' code points (between spaces); the background's colour; the kind of scene (`single`, `pair:left`,
`count:3`, `card:red` or `card:red,blue` in the objects' order, or `unknown` with `-` for objects where the prompt's
words were never trained on); and 1 where the combination is held out from training.

`tests/make_prompt_lists.py` of the repository draws the lists of `docs/prompts/`; strangers-100 was written by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.checkpoint import shipped
from ldm.data.emoji import COLOURS, EmojiObject, Spec, find, held_out
from ldm.errors import DataError, nearest

LISTS = ("everyday-30", "everyday-100", "all-200", "pairs-20", "counts-20", "cards-20")
LISTS += ("tuning-60", "small-60", "unknown-30", "strangers-100")
ALIASES = {
    "everyday": "everyday-100",
    "all": "all-200",
    "tuning": "tuning-60",
    "small": "small-60",
    "unknown": "unknown-30",
    "strangers": "strangers-100",
}
RELATIONS = ("left", "right", "above", "below", "and")
NUMBERS = ("2", "3", "4")


@dataclass(frozen=True)
class Prompt:
    """One line of a list: a prompt, and what a right image of it shows."""

    text: str
    objects: tuple[EmojiObject, ...]
    colour: str | None  # of the background; None where every colour is right
    kind: str = "single"  # "single" | "pair:RELATION" | "count:N" | "card:COLOUR[,COLOUR]" | "unknown"
    held_out: bool = False

    @property
    def family(self) -> str:
        """single, pair, count, card or unknown."""
        return self.kind.partition(":")[0]

    @property
    def detail(self) -> str:
        """The part of the kind after its colon."""
        return self.kind.partition(":")[2]

    @classmethod
    def of(cls, spec: Spec) -> Prompt:
        """The prompt of a drawn scene, for judging images of training captions."""
        kinds = {
            "single": "single",
            "pair": f"pair:{spec.relation}",
            "count": f"count:{len(spec.objects)}",
            "card": "card:" + ",".join(card.colour for card in spec.cards),
        }
        things = tuple(p.object for p in spec.objects)[: 1 if spec.kind == "count" else None]
        colour = spec.colour if spec.mentioned else None
        return cls(spec.caption, things, colour, kinds[spec.kind], all(map(held_out, spec.judged)))

    def line(self) -> str:
        """The line of a file."""
        codes = " ".join(thing.codepoints for thing in self.objects) or "-"
        return "\t".join((self.text, codes, self.colour or "-", self.kind, str(int(self.held_out))))


def folder() -> Path:
    """The folder of the lists: `docs/prompts/` of the checkout, or its copy in the wheel."""
    return shipped("docs/prompts")


def open_list(prompts: str | Path | Sequence) -> tuple[str, list[Prompt]]:
    """(name, prompts) of a list's name, a file, or a sequence of Prompt or (text, object[, colour]).

    Raises DataError for a name that is neither list nor file, a line that cannot be read, and an empty list.
    """
    if not isinstance(prompts, (str, Path)):
        name, entries = "given", [_from_tuple(item, i) for i, item in enumerate(prompts, 1)]
    else:
        name = ALIASES.get(str(prompts), str(prompts))
        path = folder() / f"{name}.tsv" if name in LISTS else Path(prompts)
        if not path.is_file():
            hint = nearest(name, [*ALIASES, *LISTS])
            raise DataError("is neither a list of prompts nor a file", where=prompts, hint=hint)
        entries = list(_read(path))
    if not entries:
        raise DataError("holds no prompt", where=name, hint="give at least one line")
    return name, entries


def _from_tuple(item: Prompt | Sequence[str], number: int) -> Prompt:
    if isinstance(item, Prompt):
        return item
    if isinstance(item, str) or not 2 <= len(item) <= 3:
        raise DataError("expected (prompt, object) or (prompt, object, colour)", where=f"prompt {number}")
    thing, colour = find(item[1]), item[2] if len(item) == 3 else None
    _check_colour(colour, f"prompt {number}")
    return Prompt(item[0], (thing,), colour, "single", bool(colour) and held_out(("on", thing.codepoints, colour)))


def _check_colour(colour: str | None, where: str) -> None:
    if colour is not None and colour not in COLOURS:
        raise DataError(f"unknown colour {colour!r}", where=where, hint=nearest(str(colour), COLOURS))


def _read(path: Path) -> Iterator[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read ({error})", where=path) from None
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            yield _parse(line, f"{path}:{number}")


def _parse(line: str, where: str) -> Prompt:
    columns = line.split("\t")
    if len(columns) != 5 or not columns[0].strip() or columns[4] not in ("0", "1"):
        hint = "five columns between tabs: prompt, code points, colour, kind, 0 or 1"
        raise DataError("not a line of a prompt list", where=where, hint=hint)
    text, codes, colour, kind, flag = columns
    try:
        things = () if codes == "-" else tuple(find(code) for code in codes.split())
    except DataError as error:
        raise DataError(error.what, where=where, hint=error.hint) from None
    _check_colour(None if colour == "-" else colour, where)
    prompt = Prompt(text, things, None if colour == "-" else colour, kind, flag == "1")
    if not _sound(prompt):
        raise DataError(f"kind {kind!r} does not fit {len(things)} objects", where=where, hint="see the file's head")
    return prompt


def _sound(prompt: Prompt) -> bool:
    number, detail = len(prompt.objects), prompt.detail
    if prompt.family == "card":
        colours = detail.split(",")
        return number == len(colours) <= 2 and all(c in COLOURS for c in colours)
    tests = {
        "single": number == 1 and not detail,
        "unknown": number == 0 and not detail,
        "pair": number == 2 and detail in RELATIONS,
        "count": number == 1 and detail in NUMBERS,
    }
    return tests.get(prompt.family, False)
