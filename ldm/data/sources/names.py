"""Captions from the names of folders and files: `animals/fish/golfinho_luciano_br_01.png` -> "golfinho, fish, animals".

Collections of many hands name a file by title, author and number, and cut the whole at some length. Numbers and what
stands in a few words only for counting go; authors are found by their habits: words that follow many different titles
and are never the first word of one.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

from ldm.data.sources.walk import SPLITS

FOLDERS = 2  # of the folders above a picture, the nearest whose names say something
# Names that say nothing of what is to be seen.
EMPTY = {"image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "photos", "foto", "untitled"}
EMPTY |= {"dsc", "dscn", "dscf", "pxl", "screenshot", "scan", "file", "files", "data", "dataset", "png", "jpg", "jpeg"}
EMPTY |= {"unsorted", "misc", "miscellany", "various", "other", "others", "copy", "final", "duplicates"}
EMPTY |= {"tests", "tmp", "special", "example", "examples", "clipart", *SPLITS}
TITLES = 4  # different titles before a word, from which on it may be an author's
SINGLE = 9  # the same, of an author with one word


def captions_from_names(names: Sequence[str]) -> list[tuple[str, ...]]:
    """One caption for each path with "/" between its parts; `()` where a name and its folders say nothing."""
    words = [_words(PurePosixPath(name).stem) for name in names]
    folders = [str(PurePosixPath(name).parent) for name in names]
    authors = _authors(words, folders)
    longest = _longest(names)
    captions = []
    for name, said in zip(names, words, strict=True):
        stem = PurePosixPath(name).stem
        title = _meaningful(_without_author(said, authors, len(_base(stem)) >= longest - 1))
        parts = [" ".join(title)] if title else []
        for folder in reversed(PurePosixPath(name).parts[:-1]):
            above = _meaningful(_words(folder))
            if above and len(parts) < FOLDERS + bool(title) and not set(above) <= set(" ".join(parts).split(" ")):
                parts.append(" ".join(above))
        captions.append((", ".join(parts),) if parts else ())
    return captions


def _base(stem: str) -> str:
    """The name less the number at its end and what tools add to copies."""
    stem = re.sub(r"(?i)[\s_-]*(\(\d+\)|copy(\s*\d+)?|kopie)$", "", stem)
    return re.sub(r"[_\-. ]\d+[a-z]?$", "", stem)


def _words(stem: str) -> list[str]:
    """Lower-case words; cut at capitals inside of a word, and a lone s goes to the word before it."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", _base(stem))
    parted = re.sub(r"_(39_)?s_(?=[^\W\d_]{3})", "'s ", parted)
    return [word for word in re.split(r"[\s_\-+.,;:()\[\]{}&!@#%=~]+", parted.lower()) if word]


def _meaningful(words: Sequence[str]) -> list[str]:
    """Less numbers, codes and words that say nothing; digits at the ends of a word go."""
    kept = []
    for word in words:
        bare = word.strip("0123456789'")
        if not bare or bare in EMPTY or any(letter.isdigit() for letter in bare) or (len(bare) == 1 and bare.isascii()):
            continue
        kept.append(bare)
    return kept


def _longest(names: Sequence[str]) -> int:
    """The length at which names were cut: the greatest that at least one in fifty has; without any, none was."""
    lengths = Counter(len(_base(PurePosixPath(name).stem)) for name in names)
    often = [length for length, count in lengths.items() if count >= max(3, len(names) / 50)]
    greatest = max(often, default=0)
    beyond = sum(count for length, count in lengths.items() if length > greatest)
    return greatest if greatest >= 12 and beyond <= len(names) / 20 else 1 << 30


def _authors(words: Sequence[Sequence[str]], folders: Sequence[str]) -> set[str]:
    """First words of authors: they follow several titles, begin none, and what comes after them is always the same."""
    begins = Counter(said[0] for said in words if said)
    pairs = Counter(pair for said in words for pair in itertools.pairwise(said))
    follows = Counter(word for said in words for word in said[1:])
    titles, tails, places = defaultdict(set), defaultdict(Counter), defaultdict(set)
    for said, folder in zip(words, folders, strict=True):
        for i in range(1, len(said)):
            titles[said[i]].add(" ".join(said[:i]).strip("0123456789 "))
            tails[said[i]]["".join(said[i + 1 :]).strip("0123456789")] += 1
            places[said[i]].add(folder)
    single, double = set(), set()
    for word, before in titles.items():
        count, alone = tails[word].total(), tails[word][""]
        if len(word) < 3 or any(letter.isdigit() for letter in word) or begins[word] > count / 20:
            continue
        if alone == count:
            single |= {word} if len(before) >= SINGLE and len(places[word]) >= 5 else set()
        elif len(before) >= TITLES and alone <= count / 4 and len(places[word]) >= 3 and _one_name(tails[word]):
            double.add(word)
    # "seagreen" stands before "benji park" as other words do; before the "victor" of "jean victor" nothing else does
    titled = {
        one
        for (one, other), count in pairs.items()
        if {one, other} <= double and count > follows[one] / 2 and count < follows[other] / 2
    }
    return single | (double - titled)


def _one_name(tails: Counter[str]) -> bool:
    """Whether all, but for a tenth, are one and the same, or its beginning: a name that was cut at different places."""
    whole = max(tails, key=lambda tail: (tails[tail] if len(tail) > 1 else 0, tail))
    if len(whole) < 2:
        return False
    same = (n for tail, n in tails.items() if whole.startswith(tail) or tail.startswith(whole))
    return sum(same) >= 0.9 * tails.total()


def _without_author(words: Sequence[str], authors: set[str], cut: bool) -> list[str]:
    """The words before the author's; in a name that was cut, the rest of one at its end goes too."""
    for i in range(len(words)):
        if words[i] in authors:
            return list(words[:i])
    kept = list(words)
    if cut and len(kept) > 1 and any(author.startswith(kept[-1]) and author != kept[-1] for author in authors):
        kept.pop()
    return kept
