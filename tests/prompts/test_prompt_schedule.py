"""Prompt editing and alternation: which text at which step."""

import pytest

from ldm.errors import ConfigError
from ldm.prompts import Prompt, parse

# Over 10 steps. All were compared with A1111's grammar in an Earley parser, but for the two marked ones, on which it
# gives up.
TABLE = {
    "test": [(0, "test")],
    "": [(0, "")],
    "a [b:3]": [(0, "a "), (3, "a b")],
    "a [b: 3]": [(0, "a "), (3, "a b")],
    "a [b:.5] c": [(0, "a  c"), (5, "a b c")],
    "a [b : c : 1] d": [(0, "a b  d"), (1, "a  c  d")],
    "[a::0.3] b": [(0, "a b"), (3, " b")],
    "[a:b:0.25]": [(0, "a"), (2, "b")],  # 2.5 steps, rounded down
    "[a:b:0]": [(0, "b")],
    "[a:b:0.01]": [(0, "b")],
    "[a:b:-1]": [(0, "b")],
    "[a:b:1.0]": [(0, "a")],  # all of the steps
    "[a:b:1]": [(0, "a"), (1, "b")],  # one step
    "[a:b:12]": [(0, "a")],
    "[a:a:5]": [(0, "a")],
    "a [[[b]]:2]": [(0, "a "), (2, "a [[b]]")],
    "[(a:2):3]": [(0, ""), (3, "(a:2)")],
    "[a (b:1.3):c:5] (d:1.2)": [(0, "a (b:1.3) (d:1.2)"), (5, "c (d:1.2)")],
    "(a:[1:1.5:5])": [(0, "(a:1)"), (5, "(a:1.5)")],
    "a[b:[c:d:2]:1]e": [(0, "abe"), (1, "ace"), (2, "ade")],
    "[[a|b]:c:3]": [(0, "a"), (1, "b"), (2, "a"), (3, "c")],
    "[a|(b:1.1)]": [(i, ("a", "(b:1.1)")[i % 2]) for i in range(10)],
    "[fe|]male": [(i, ("female", "male")[i % 2]) for i in range(10)],
    "[fe|||]male": [(0, "female"), (1, "male"), (4, "female"), (5, "male"), (8, "female"), (9, "male")],
    "[a|b|c]": [(i, "abc"[i % 3]) for i in range(10)],
    "[a|a]": [(0, "a")],
    r"[a\:b:c:3]": [(0, r"a\:b"), (3, "c")],
    r"\[a:b:3\]": [(0, r"\[a:b:3\]")],
    r"[a\|b|c:x]": [(0, r"[a\|b|c:x]")],  # gives up
    "a [unbalanced": [(0, "a [unbalanced")],
    "((a][:b:c [d:3]": [(0, "((a][:b:c "), (3, "((a][:b:c d")],
    "[a (b:c:3]": [(0, "[a (b:c:3]")],  # the brackets inside are not balanced
    "[a:b]": [(0, "[a:b]")],
    "[a:b:c:3]": [(0, "[a:b:c:3]")],
    "[a:b c:3 d]": [(0, "[a:b c:3 d]")],
    "a BREAK [b:c:2]": [(0, "a BREAK b"), (2, "a BREAK c")],
    "{a|b} [c:d:3]": [(0, "{a|b} c"), (3, "{a|b} d")],  # gives up: [c:d:3] stays as it is
}


def at_steps(prompt, n):
    texts = Prompt.parse(prompt).at_steps(n)
    assert all(list(text.pieces) == parse(text.written) for _, text in texts)
    return [(first, text.written) for first, text in texts]


@pytest.mark.parametrize("prompt", TABLE)
def test_texts_and_steps(prompt):
    assert at_steps(prompt, 10) == TABLE[prompt]


def test_fractions_follow_the_number_of_steps_and_whole_numbers_do_not():
    assert at_steps("[a:b:0.5] [c:d:5]", 40) == [(0, "a c"), (5, "a d"), (20, "b d")]
    assert at_steps("[a:b:0.5]", 1) == [(0, "b")]  # half a step, rounded down
    assert at_steps("[a|b]", 1) == [(0, "a")]


@pytest.mark.parametrize("prompt", ["[a:b]", "[a:b:c]", "[a|b:0.5]", "[a:b|c:3]", "x [a:[b:c]:4]"])
def test_what_only_looks_like_editing_is_remarked(prompt):
    (line,) = Prompt.parse(prompt).remarks
    assert "is neither [a:b:0.5] nor [a|b], and is taken as emphasis" in line


@pytest.mark.parametrize("prompt", ["[a:b:0.5]", "[a|b]", "(a:1.2) [b] [c:[d|e]:3]", r"\[a:b\]", "a: b, c|d"])
def test_what_is_right_says_nothing(prompt):
    assert Prompt.parse(prompt).remarks == ()


def test_brackets_too_deep_are_refused():
    with pytest.raises(ConfigError, match="nested more than 100 deep"):
        at_steps("[a:" * 101 + "b" + ":3]" * 101, 10)
    assert at_steps("[a:" * 90 + "b" + ":3]" * 90, 10) == [(0, "a"), (3, "b")]


def test_equal_texts_are_equal_prompts():
    assert Prompt.parse("a [b|c]") == Prompt.parse("a [b|c]") != Prompt.parse("a [b|d]")
    assert len({Prompt.parse("a"), Prompt.parse("a")}) == 1
