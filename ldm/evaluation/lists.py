"""Lists of prompts with what they ask for: committed under `docs/prompts/`, drawn again where those are missing.

A list is a text file: comment lines that begin with `#`, then one prompt a line with five columns between tabs:
the prompt, the objects' code points (between spaces), the ground's colour, the kind of scene (`single`, `pair:left`,
`count:3`, `card:red` or `card:red,blue` in the objects' order; `unknown` with `-` for objects where the prompt's words
were never trained on) and 1 where the combination is held out from training.

    python -m ldm.evaluation.lists          writes all drawn lists anew into docs/prompts/
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.data.emoji import COLOURS, EmojiObject, SceneConfig, Scenes, Spec, everyday, find, held_out, objects
from ldm.data.emoji.captions import article
from ldm.data.emoji.draws import Draw
from ldm.errors import DataError, nearest
from ldm.files import atomic_write

FOLDER = Path(__file__).parents[2] / "docs" / "prompts"  # of a checkout
SEED = 2024
ALIASES = {
    "everyday": "everyday-100",
    "all": "all-200",
    "tuning": "tuning-60",
    "small": "small-60",
    "unknown": "unknown-30",
    "strangers": "strangers-100",
}
WRITTEN = ("strangers-100",)  # by hand: found in a checkout, never drawn again
HEAD = "# prompt\tobjects\tcolour\tkind\theld_out"
RELATIONS = {
    "left": "{a} to the left of {b}",
    "right": "{a} to the right of {b}",
    "above": "{a} above {b}",
    "below": "{a} below {b}",
    "and": "{a} and {b}",
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
UNKNOWN = (  # no name, synonym or keyword of the 849 objects
    "platypus armadillo walrus pelican iguana narwhal stapler wardrobe chandelier harpsichord submarine bulldozer "
    "gazebo igloo windmill lighthouse escalator thermos spatula colander trampoline papaya artichoke wheelbarrow "
    "sundial toucan anvil scarecrow metronome typewriter"
)


@dataclass(frozen=True)
class Prompt:
    """One line of a list: what is asked for, and what a right picture shows."""

    text: str
    objects: tuple[EmojiObject, ...]
    colour: str | None  # of the ground; None where any will do
    kind: str = "single"  # "single" | "pair:RELATION" | "count:N" | "card:COLOUR[,COLOUR]" | "unknown"
    held_out: bool = False

    @property
    def family(self) -> str:
        """single, pair, count, card or unknown."""
        return self.kind.partition(":")[0]

    @property
    def detail(self) -> str:
        """What follows the colon of the kind."""
        return self.kind.partition(":")[2]

    @classmethod
    def of(cls, spec: Spec) -> Prompt:
        """A drawn scene's own caption and content, to judge pictures of training captions."""
        kinds = {
            "single": "single",
            "pair": f"pair:{spec.relation}",
            "count": f"count:{len(spec.objects)}",
            "card": "card:" + ",".join(card.colour for card in spec.cards),
        }
        things = tuple(p.object for p in spec.objects)[: 1 if spec.kind == "count" else None]
        told = spec.colour if spec.mentioned else None
        return cls(spec.caption, things, told, kinds[spec.kind], all(map(held_out, spec.judged)))

    def line(self) -> str:
        """As written in a file."""
        codes = " ".join(thing.codepoints for thing in self.objects) or "-"
        return "\t".join((self.text, codes, self.colour or "-", self.kind, str(int(self.held_out))))


def say(thing: EmojiObject) -> str:
    """The object's commonest word with its plain article: "a cat", "some grapes", "the moon"."""
    form = thing.forms[0]
    before = {"plural": "some", "mass": "some", "unique": "the"}.get(form.kind) or article(form.text)
    return f"{before} {form.text}"


def coloured(colour: str, what: str = "background") -> str:
    """ "a red background", "an orange card"."""
    return f"{article(colour)} {colour} {what}"


def single(thing: EmojiObject, colour: str) -> Prompt:
    """ "a cat on a red background"."""
    flag = held_out(("on", thing.codepoints, colour))
    return Prompt(f"{say(thing)} on {coloured(colour)}", (thing,), colour, "single", flag)


# Drawing lists.


class Spread:
    """Picks the colour used least so far, so that all twelve come about equally often."""

    def __init__(self, draw: Draw):
        self.draw, self.used = draw, Counter(dict.fromkeys(COLOURS, 0))

    def pick(self, colours: Sequence[str]) -> str:
        """One of `colours`."""
        least = min(self.used[c] for c in colours)
        colour = self.draw.pick([c for c in colours if self.used[c] == least])
        self.used[colour] += 1
        return colour


def shuffled(draw: Draw, items: Sequence) -> list:
    """All items in a drawn order."""
    left = list(items)
    return [left.pop(draw.integer(0, len(left) - 1)) for _ in range(len(left))]


def colours_of(thing: EmojiObject, kept: bool) -> list[str]:
    """The colours of whose grounds this object is held out (`kept` True) or not."""
    return [c for c in COLOURS if held_out(("on", thing.codepoints, c)) == kept]


def by_turns(columns: Sequence[Sequence]) -> list:
    """The first of each column, then the second of each, as far as the shortest goes."""
    return [item for row in zip(*columns) for item in row]


def draw_everyday(each: int, seed: int, kept: bool = True) -> list[Prompt]:
    """`each` everyday objects of all five groups by turns; an object comes twice only where the others are used up."""
    draw = Draw(seed, each)
    spread, columns = Spread(draw), []
    for group in dict.fromkeys(o.group for o in everyday()):
        things = shuffled(draw, [o for o in everyday() if o.group == group and colours_of(o, kept)])
        column = [single(o, spread.pick(colours_of(o, kept))) for o in things[:each]]
        for o in things:  # a second colour
            rest = [c for c in colours_of(o, kept) if not any(p.objects == (o,) and p.colour == c for p in column)]
            if len(column) < each and rest:
                column.append(single(o, spread.pick(rest)))
        columns.append(column)
    return by_turns(columns)


def draw_all(count: int, seed: int) -> list[Prompt]:
    """`count` of the 849 objects, on a held-out colour where they have one."""
    draw = Draw(seed, count)
    spread = Spread(draw)
    things = shuffled(draw, objects())[:count]
    return [single(o, spread.pick(colours_of(o, True) or list(COLOURS))) for o in things]


def draw_small(things: int, grounds: int, seed: int) -> list[Prompt]:
    """`things` everyday objects of all five groups by turns, each on `grounds` trained colours, thing by thing."""
    draw = Draw(seed, things)
    spread, groups = Spread(draw), list(dict.fromkeys(o.group for o in everyday()))
    columns = [shuffled(draw, [o for o in everyday() if o.group == group]) for group in groups]
    found = []
    for thing in by_turns(columns)[:things]:
        left = colours_of(thing, False)
        for _ in range(grounds):
            found.append(single(thing, spread.pick(left)))
            left.remove(found[-1].colour)
    return found


def draw_arranged(kind: str, count: int, seed: int) -> list[Prompt]:
    """`count` different held-out pairs, counts or cards of everyday objects."""
    scenes, found = Scenes(SceneConfig(kinds={kind: 1.0}, held_out=True), seed), {}
    for i in range(20 * count):
        prompt = plain(scenes.spec(i))
        if len(found) < count:
            found.setdefault((prompt.objects, prompt.kind), prompt)
    return list(found.values())


def plain(spec: Spec) -> Prompt:
    """The scene of a spec in the lists' plain wording, its ground told."""
    prompt = Prompt.of(spec)
    things = [say(o) for o in prompt.objects]
    if prompt.family == "pair":
        said = RELATIONS[prompt.detail].format(a=things[0], b=things[1])
    elif prompt.family == "count":
        said = f"{NUMBERS[int(prompt.detail)]} {prompt.objects[0].countable[0].plural}"
    elif prompt.family == "card":
        said = " and ".join(f"{t} on {coloured(c, 'card')}" for t, c in zip(things, prompt.detail.split(",")))
    else:
        said = things[0]
    text = f"{said} on {coloured(spec.colour)}"
    return Prompt(text, prompt.objects, spec.colour, prompt.kind, prompt.held_out)


def draw_unknown(seed: int) -> list[Prompt]:
    """Things that no caption of the training names, on a ground of a drawn colour."""
    spread, words = Spread(Draw(seed, 0)), UNKNOWN.split()
    colours = [spread.pick(list(COLOURS)) for _ in words]
    return [Prompt(f"{article(w)} {w} on {coloured(c)}", (), c, "unknown", True) for w, c in zip(words, colours)]


ARRANGED = "{} held-out {} of everyday objects: what they are about was never trained on"
LISTS: dict[str, tuple[str, Callable[[], list[Prompt]]]] = {  # name -> how it was drawn, and the draw
    "everyday-30": (
        "6 everyday objects from each of the five groups, each on a ground it is held out from",
        lambda: draw_everyday(6, SEED),
    ),
    "everyday-100": (
        "20 (everyday object, ground) pairs from each of the five groups, held out; an object comes twice where a group"
        " has fewer than 20 with a held-out ground",
        lambda: draw_everyday(20, SEED + 1),
    ),
    "all-200": (
        "200 of all 849 objects, each on a ground it is held out from where it has one (else the last column is 0)",
        lambda: draw_all(200, SEED + 2),
    ),
    "pairs-20": (ARRANGED.format(20, "pairs"), lambda: draw_arranged("pair", 20, SEED + 3)),
    "counts-20": (ARRANGED.format(20, "counts"), lambda: draw_arranged("count", 20, SEED + 4)),
    "cards-20": (ARRANGED.format(20, "cards"), lambda: draw_arranged("card", 20, SEED + 5)),
    "tuning-60": (
        "12 everyday objects from each of the five groups on grounds that are trained on: the list to tune with",
        lambda: draw_everyday(12, SEED + 6, kept=False),
    ),
    "small-60": (
        "15 everyday objects, three from each of the five groups, each on four grounds that are trained on: what"
        " `ldm train emoji/small` learns",
        lambda: draw_small(15, 4, SEED + 8),
    ),
    "unknown-30": (
        "30 things that no caption of the training names: only whether something clear is drawn can be judged",
        lambda: draw_unknown(SEED + 7),
    ),
}


# Reading and writing.


def file_text(name: str) -> str:
    """The whole file of a list, drawn anew."""
    how, draw = LISTS[name]
    note = f"# {name}: {how}; seeded draw by `python -m ldm.evaluation.lists`; picture i is drawn with seed i"
    return "\n".join([note, HEAD, *(prompt.line() for prompt in draw())]) + "\n"


def open_list(prompts: str | Path | Sequence) -> tuple[str, list[Prompt]]:
    """(name, prompts) of a list's name, a file, or a sequence of Prompt or (text, object[, colour]).

    Raises DataError for a name that is neither list nor file, a line that cannot be read, and an empty list.
    """
    if not isinstance(prompts, (str, Path)):
        name, found = "given", [_given(item, i) for i, item in enumerate(prompts, 1)]
    else:
        name = ALIASES.get(str(prompts), str(prompts))
        path = FOLDER / f"{name}.tsv" if name in LISTS or name in WRITTEN else Path(prompts)
        if path.is_file():
            found = list(_read(path))
        elif name in LISTS:
            found = LISTS[name][1]()
        else:
            todo = nearest(name, [*ALIASES, *LISTS])
            raise DataError("is neither a list of prompts nor a file", where=prompts, todo=todo)
    if not found:
        raise DataError("holds no prompt", where=name, todo="give at least one line")
    return name, found


def _given(item: Prompt | Sequence[str], number: int) -> Prompt:
    if isinstance(item, Prompt):
        return item
    if isinstance(item, str) or not 2 <= len(item) <= 3:
        raise DataError("expected (prompt, object) or (prompt, object, colour)", where=f"prompt {number}")
    thing, colour = find(item[1]), item[2] if len(item) == 3 else None
    _check_colour(colour, f"prompt {number}")
    return Prompt(item[0], (thing,), colour, "single", bool(colour) and held_out(("on", thing.codepoints, colour)))


def _check_colour(colour: str | None, where: str) -> None:
    if colour is not None and colour not in COLOURS:
        raise DataError(f"unknown colour {colour!r}", where=where, todo=nearest(str(colour), COLOURS))


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
        todo = "five columns between tabs: prompt, code points, colour, kind, 0 or 1"
        raise DataError("not a line of a prompt list", where=where, todo=todo)
    text, codes, colour, kind, flag = columns
    try:
        things = () if codes == "-" else tuple(find(code) for code in codes.split())
    except DataError as error:
        raise DataError(error.what, where=where, todo=error.todo) from None
    _check_colour(None if colour == "-" else colour, where)
    prompt = Prompt(text, things, None if colour == "-" else colour, kind, flag == "1")
    if not _sound(prompt):
        raise DataError(f"kind {kind!r} does not fit {len(things)} objects", where=where, todo="see the file's head")
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
        "count": number == 1 and detail in map(str, NUMBERS),
    }
    return tests.get(prompt.family, False)


def main() -> None:
    """Write all lists into the checkout."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in LISTS:
        print(atomic_write(FOLDER / f"{name}.tsv", file_text(name)))


if __name__ == "__main__":
    main()
