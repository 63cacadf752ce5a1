"""Draw the lists of prompts of `docs/prompts/` again: python tests/make_prompt_lists.py

Every list is a seeded draw; strangers-100 alone was written by hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from ldm.data.emoji import COLOURS, EmojiObject, SceneConfig, Scenes, Spec, everyday, held_out, objects
from ldm.data.emoji.captions import article
from ldm.data.emoji.draws import Draw
from ldm.evaluation.lists import Prompt, folder
from ldm.files import atomic_write

SEED = 2024
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
    """The background colours that are held out for this object (`kept` True), or the other ones."""
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


def draw_small(things: int, backgrounds: int, seed: int) -> list[Prompt]:
    """`things` everyday objects of all five groups by turns, each on `backgrounds` trained colours, thing by thing."""
    draw = Draw(seed, things)
    spread, groups = Spread(draw), list(dict.fromkeys(o.group for o in everyday()))
    columns = [shuffled(draw, [o for o in everyday() if o.group == group]) for group in groups]
    prompts = []
    for thing in by_turns(columns)[:things]:
        left = colours_of(thing, False)
        for _ in range(backgrounds):
            prompts.append(single(thing, spread.pick(left)))
            left.remove(prompts[-1].colour)
    return prompts


def draw_arranged(kind: str, count: int, seed: int) -> list[Prompt]:
    """`count` different held-out pairs, counts or cards of everyday objects."""
    scenes, prompts = Scenes(SceneConfig(kinds={kind: 1.0}, held_out=True), seed), {}
    for i in range(20 * count):
        prompt = plain(scenes.spec(i))
        if len(prompts) < count:
            prompts.setdefault((prompt.objects, prompt.kind), prompt)
    return list(prompts.values())


def plain(spec: Spec) -> Prompt:
    """The scene of a spec in the lists' plain wording, with its background."""
    prompt = Prompt.of(spec)
    things = [say(o) for o in prompt.objects]
    if prompt.family == "pair":
        phrase = RELATIONS[prompt.detail].format(a=things[0], b=things[1])
    elif prompt.family == "count":
        phrase = f"{NUMBERS[int(prompt.detail)]} {prompt.objects[0].countable[0].plural}"
    elif prompt.family == "card":
        phrase = " and ".join(f"{t} on {coloured(c, 'card')}" for t, c in zip(things, prompt.detail.split(",")))
    else:
        phrase = things[0]
    text = f"{phrase} on {coloured(spec.colour)}"
    return Prompt(text, prompt.objects, spec.colour, prompt.kind, prompt.held_out)


def draw_unknown(seed: int) -> list[Prompt]:
    """Things that no training caption names, on a background of a drawn colour."""
    spread, words = Spread(Draw(seed, 0)), UNKNOWN.split()
    colours = [spread.pick(list(COLOURS)) for _ in words]
    return [Prompt(f"{article(w)} {w} on {coloured(c)}", (), c, "unknown", True) for w, c in zip(words, colours)]


ARRANGED = "{} held-out {} of everyday objects: what they are about was never trained on"
DRAWN: dict[str, tuple[str, Callable[[], list[Prompt]]]] = {  # name -> how it was drawn, and the draw
    "everyday-30": (
        "6 everyday objects from each of the five groups, each on a background it is held out from",
        lambda: draw_everyday(6, SEED),
    ),
    "everyday-100": (
        "20 (everyday object, background) pairs from each of the five groups, held out; an object comes twice where a"
        " group has fewer than 20 with a held-out background",
        lambda: draw_everyday(20, SEED + 1),
    ),
    "all-200": (
        "200 of all 849 objects, each on a background it is held out from where it has one (else the last column is 0)",
        lambda: draw_all(200, SEED + 2),
    ),
    "pairs-20": (ARRANGED.format(20, "pairs"), lambda: draw_arranged("pair", 20, SEED + 3)),
    "counts-20": (ARRANGED.format(20, "counts"), lambda: draw_arranged("count", 20, SEED + 4)),
    "cards-20": (ARRANGED.format(20, "cards"), lambda: draw_arranged("card", 20, SEED + 5)),
    "tuning-60": (
        "12 everyday objects from each of the five groups on backgrounds that are trained on: the list to tune with",
        lambda: draw_everyday(12, SEED + 6, kept=False),
    ),
    "small-60": (
        "15 everyday objects, three from each of the five groups, each on four backgrounds that are trained on: what"
        " `ldm train emoji/small` learns",
        lambda: draw_small(15, 4, SEED + 8),
    ),
    "unknown-30": (
        "30 things that no caption of the training names: only whether something clear is drawn can be judged",
        lambda: draw_unknown(SEED + 7),
    ),
}


def file_text(name: str) -> str:
    """The whole file of a list, drawn anew."""
    how, draw = DRAWN[name]
    note = f"# {name}: {how}; seeded draw by `python tests/make_prompt_lists.py`; image i is drawn with seed i"
    return "\n".join([note, HEAD, *(prompt.line() for prompt in draw())]) + "\n"


def main() -> None:
    """Write all drawn lists into the checkout."""
    for name in DRAWN:
        print(atomic_write(folder() / f"{name}.tsv", file_text(name)))


if __name__ == "__main__":
    main()
