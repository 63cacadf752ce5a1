"""Captions from the names of folders and files: `animals/fish/golfinho_luciano_br_01.png` -> "golfinho, fish, animals".

Collections by many authors name a file by title, author and number, and cut the name at some length. Numbers and
words that only count are removed. Authors are found by position: words that follow many different titles and never
begin one.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

from ldm.data.sources.source import Counts
from ldm.data.sources.splits import SPLITS
from ldm.data.sources.walk import Listing
from ldm.prompts import plain_text

FOLDERS = 2  # folders above an image that are used: the nearest with meaningful names
# Names that say nothing about the image.
EMPTY = {"image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "photos", "foto", "untitled"}
EMPTY |= {"dsc", "dscn", "dscf", "pxl", "screenshot", "scan", "file", "files", "data", "dataset", "png", "jpg", "jpeg"}
EMPTY |= {"unsorted", "misc", "miscellany", "various", "other", "others", "copy", "final", "duplicates"}
EMPTY |= {"tests", "tmp", "special", "example", "examples", "clipart", *SPLITS}
TITLES = 4  # different titles before a word, from which on the word may be an author's name
SINGLE = 9  # the same, for an author whose name is one word


def captions_from_names(names: Sequence[str]) -> list[tuple[str, ...]]:
    """One caption for each path with "/" between its parts; `()` where the path holds no meaningful words."""
    names = [plain_text(name) for name in names]
    words = [_words(PurePosixPath(name).stem) for name in names]
    folders = [str(PurePosixPath(name).parent) for name in names]
    authors = _authors(words, folders)
    longest = _longest(names)
    captions = []
    for name, name_words in zip(names, words, strict=True):
        stem = PurePosixPath(name).stem
        title = _meaningful(_without_author(name_words, authors, len(_base(stem)) >= longest - 1))
        parts = [" ".join(title)] if title else []
        for folder in reversed(PurePosixPath(name).parts[:-1]):
            above = _meaningful(_words(folder))
            if above and len(parts) < FOLDERS + bool(title) and not set(above) <= set(" ".join(parts).split(" ")):
                parts.append(" ".join(above))
        captions.append((", ".join(parts),) if parts else ())
    return captions


def by_name(names: list[str], listing: Listing, counts: Counts) -> list[tuple[str, tuple[str, ...], int]]:
    """(path below the root, captions, repeats) of images whose captions are made of their names."""
    if listing.metadata or listing.captions:
        files = len(listing.metadata) + len(listing.captions)
        counts.notes.append(f"{files} files with captions are ignored: captions come from names, as requested")
    rows = [(name, texts, 1) for name, texts in zip(names, captions_from_names(names), strict=True)]
    for name, texts, _ in rows:
        counts.use(name, texts, has_caption=False)
    return rows


def _base(stem: str) -> str:
    """The name without the number at its end and the suffixes that tools add to copies."""
    stem = re.sub(r"(?i)[\s_-]*(\(\d+\)|copy(\s*\d+)?|kopie)$", "", stem)
    return re.sub(r"[_\-. ]\d+[a-z]?$", "", stem)


def _words(stem: str) -> list[str]:
    """Lower-case words, split at capitals inside a word; a lone s is joined to the word before it."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", _base(stem))
    parted = re.sub(r"_(39_)?s_(?=[^\W\d_]{3})", "'s ", parted)
    return [word for word in re.split(r"[\s_\-+.,;:()\[\]{}&!@#%=~]+", parted.lower()) if word]


def _meaningful(words: Sequence[str]) -> list[str]:
    """The words without numbers, codes and empty words; digits at the ends of a word are removed."""
    kept = []
    for word in words:
        bare = word.strip("0123456789'")
        if not bare or bare in EMPTY or any(letter.isdigit() for letter in bare) or (len(bare) == 1 and bare.isascii()):
            continue
        kept.append(bare)
    return kept


def _longest(names: Sequence[str]) -> int:
    """The length at which names were cut: the greatest that at least one in fifty has; 2^30 where none was cut."""
    lengths = Counter(len(_base(PurePosixPath(name).stem)) for name in names)
    often = [length for length, count in lengths.items() if count >= max(3, len(names) / 50)]
    greatest = max(often, default=0)
    beyond = sum(count for length, count in lengths.items() if length > greatest)
    return greatest if greatest >= 12 and beyond <= len(names) / 20 else 1 << 30


def _authors(words: Sequence[Sequence[str]], folders: Sequence[str]) -> set[str]:
    """First words of authors' names: they follow several titles, begin none, and are always followed by the same."""
    begins = Counter(name_words[0] for name_words in words if name_words)
    pairs = Counter(pair for name_words in words for pair in itertools.pairwise(name_words))
    follows = Counter(word for name_words in words for word in name_words[1:])
    titles, tails, seen_in = defaultdict(set), defaultdict(Counter), defaultdict(set)
    for name_words, folder in zip(words, folders, strict=True):
        for i in range(1, len(name_words)):
            titles[name_words[i]].add(" ".join(name_words[:i]).strip("0123456789 "))
            tails[name_words[i]]["".join(name_words[i + 1 :]).strip("0123456789")] += 1
            seen_in[name_words[i]].add(folder)
    single, double = set(), set()
    for word, before in titles.items():
        count, alone = tails[word].total(), tails[word][""]
        if len(word) < 3 or any(letter.isdigit() for letter in word) or begins[word] > count / 20:
            continue
        if alone == count:
            single |= {word} if len(before) >= SINGLE and len(seen_in[word]) >= 5 else set()
        elif len(before) >= TITLES and alone <= count / 4 and len(seen_in[word]) >= 3 and _one_name(tails[word]):
            double.add(word)
    # "seagreen" stands before "benji park" as other words do; before the "victor" of "jean victor" nothing else does
    titled = {
        first
        for (first, second), count in pairs.items()
        if {first, second} <= double and count > follows[first] / 2 and count < follows[second] / 2
    }
    return single | (double - titled)


def _one_name(tails: Counter[str]) -> bool:
    """Whether nine tenths of the tails are the same name, or a beginning of it (it was cut at different places)."""
    whole = max(tails, key=lambda tail: (tails[tail] if len(tail) > 1 else 0, tail))
    if len(whole) < 2:
        return False
    same = (n for tail, n in tails.items() if whole.startswith(tail) or tail.startswith(whole))
    return sum(same) >= 0.9 * tails.total()


def _without_author(words: Sequence[str], authors: set[str], cut: bool) -> list[str]:
    """The words before the author's name; of a name that was cut, the rest of the author's name is removed too."""
    for i in range(len(words)):
        if words[i] in authors:
            return list(words[:i])
    kept = list(words)
    if cut and len(kept) > 1 and any(author.startswith(kept[-1]) and author != kept[-1] for author in authors):
        kept.pop()
    return kept
