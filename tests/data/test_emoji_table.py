from collections import Counter
from importlib import resources

import pytest

from ldm.data import emoji
from ldm.data.emoji import COLOURS, EVERYDAY, class_of, common, find, objects
from ldm.errors import DataError

GROUPS = {"Animals & Nature": 152, "Food & Drink": 133, "Travel & Places": 218, "Activities": 85, "Objects": 261}


def test_there_are_849_objects_of_five_groups():
    assert Counter(o.group for o in objects()) == GROUPS and len(objects()) == 849
    assert len({o.char for o in objects()}) == len({o.name for o in objects()}) == 849
    assert all(not set(o.char) & {chr(c) for c in range(0x1F3FB, 0x1F400)} for o in objects())  # no skin tones
    assert all(o.keywords and all(o.keywords) for o in objects())
    assert find("flute").keywords == ("instrument", "music", "recorder", "woodwind")  # one of the 13 filled by hand


def test_there_are_150_everyday_words_25_or_more_a_group():
    assert len(EVERYDAY) == len(set(EVERYDAY)) == 150
    groups = Counter(find(word).group for word in EVERYDAY)
    assert set(groups) == set(GROUPS) and min(groups.values()) >= 25
    first = {"cat", "dog", "pizza", "car", "house", "tree", "apple", "book", "sun", "star", "heart", "fish", "bird"}
    assert first <= set(EVERYDAY)


def test_the_common_objects_are_some_300_and_hold_the_everyday_ones():
    things = common()
    assert 290 <= len(things) <= 320
    assert len({o.lookalike_class for o in things}) == len(things)  # no two are taken for each other
    assert {find(word) for word in EVERYDAY} <= set(things) and all(o.common for o in things)
    assert {o.word for o in things} >= {"hedgehog", "cupcake", "saxophone", "broom", "lobster", "canoe", "pretzel"}
    assert find("wallet").word == "purse" and not find("cat face").common


def test_no_word_belongs_to_two_objects():
    owners: dict[str, set[str]] = {}
    for o in objects():
        for word in o.words:
            owners.setdefault(word, set()).add(o.name)
        assert o.name.lower().replace("’", "'") in o.words
        assert all(word == word.lower().strip() and "," not in word for word in o.words)
    assert {word: names for word, names in owners.items() if len(names) > 1} == {}


@pytest.mark.parametrize(
    ("word", "char"),
    [
        ("cat", "🐈"), ("kitty", "🐈"), ("cat face", "🐱"), ("puppy", "🐕"), ("car", "🚗"), ("tree", "🌳"),
        ("orange", "🍊"), ("apple", "🍎"), ("heart", "♥️"), ("moon", "🌙"), ("phone", "📱"), ("mouse", "🐁"),
        ("mice", "🐁"), ("books", "📚"), ("Cat", "🐈"), ("1F408", "🐈"), ("♥", "♥️"), ("t-rex", "🦖"),
    ],
)  # fmt: skip
def test_words_find_what_people_mean(word, char):
    assert find(word).char == char


def test_unknown_words_are_told_with_the_nearest():
    with pytest.raises(DataError, match=r"no object is called 'elefant'; did you mean 'elephant'"):
        find("elefant")


def test_lookalikes_are_classes():
    assert class_of("🐈") == class_of("🐱") == "cat" and class_of("🐕") == class_of("dog face")
    assert class_of("🐈") != class_of("🐈‍⬛") != class_of("🐕")
    clocks = emoji.lookalikes()["twelve o’clock"]
    assert len(clocks) == 24 and class_of("alarm clock") == "alarm clock"
    assert class_of("🌒") == class_of("🌕") != class_of("🌙")
    assert class_of("📕") == class_of("📘") != class_of("📖")
    names = {o.name for o in objects()}
    for name, members in emoji.lookalikes().items():
        assert name in names and name in {m.name for m in members}  # a class is called by one of its members
    assert len(emoji.lookalikes()) > 700  # most objects stand alone
    everyday = [class_of(word) for word in EVERYDAY]
    assert len(set(everyday)) == 150  # no two everyday objects are taken for each other


def test_the_licence_lies_beside_the_table():
    assert "Unicode" in resources.files("ldm.data.emoji").joinpath("LICENSE-UNICODE.txt").read_text(encoding="utf-8")


def test_colours_are_the_twelve():
    assert len(COLOURS) == 12 and COLOURS["black"] == (20, 20, 20) and COLOURS["teal"] == (40, 160, 160)
    assert emoji.nearest_colour((255, 0, 0)) == "red" and emoji.nearest_colour((250, 250, 255)) == "white"
