"""Emoji in texts as their Unicode names."""

import pytest

from ldm.data.emoji.names import with_names
from ldm.nn.text.conditioning import known_words, spelt


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("🐱", "cat face"),
        ("a 🍕, please", "a pizza, please"),
        ("a🐱b", "a cat face b"),
        ("🐶🐱 on red", "dog face cat face on red"),
        ("a ☂️ and a ☂", "a umbrella and a umbrella"),
        ("👟🏽", "running shoe"),
        ("★ cat 猫 1️⃣", "★ cat 猫 1️⃣"),
        ("a cat", "a cat"),
    ],
)
def test_emoji_of_the_table_become_their_names_and_all_else_stays(text, read):
    assert with_names(text, ())[0] == read


def test_emoji_that_a_model_was_trained_on_stay():
    words = known_words(["a 🐱 cat"])
    assert with_names("🐱🍕", words) == ("🐱 pizza", {"🍕": "pizza"})


def test_symbols_and_numbers_are_words_too_and_punctuation_is_none():
    assert spelt("2 Cats, a ★ (and ♥)… – 10!") == ["2", "cats", "a", "and", "10", "★", "♥"]
