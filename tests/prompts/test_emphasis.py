"""A1111's emphasis: the table of weights, nesting, escapes, BREAK, what is refused, and time that grows with length."""

import time

import pytest

from ldm.errors import ConfigError
from ldm.prompts import BREAK, Prompt, parse

TABLE = {
    "": [("", 1.0)],
    "a cat, 🐱 кошка 猫": [("a cat, 🐱 кошка 猫", 1.0)],
    "((x))": [("x", 1.1 * 1.1)],
    "[x]": [("x", 1 / 1.1)],
    "[[x]]": [("x", 1 / 1.1 / 1.1)],
    "([x])": [("x", 1.0)],
    "(x:1.3)": [("x", 1.3)],
    "(x: 1.3 )": [("x", 1.3)],
    "(x:.5)": [("x", 0.5)],
    "(x:-1)": [("x", -1.0)],
    r"\(x\)": [("(x)", 1.0)],
    r"(\(x\):1.2)": [("(x)", 1.2)],
    r"a \[b\] \\ c\d": [("a [b] \\ cd", 1.0)],
    "(x": [("x", 1.1)],
    "a (b [c": [("a ", 1.0), ("b ", 1.1), ("c", 1.0)],
    "x) y]": [("x) y]", 1.0)],
    "a:1.3)": [("a:1.3)", 1.0)],
    "((a:1.3) b)": [("a", 1.3 * 1.1), (" b", 1.1)],
    "((a:1.2):1.5)": [("a", 1.2 * 1.5)],
    "[x:1.3]": [("x:1.3", 1 / 1.1)],
    "(x:loud)": [("x:loud", 1.1)],
    "a (b) c": [("a ", 1.0), ("b", 1.1), (" c", 1.0)],
    "(a)(b)": [("ab", 1.1)],
    "a BREAK b": [("a", 1.0), BREAK, ("b", 1.0)],
    "a\n BREAK\n b, BREAKFAST": [("a", 1.0), BREAK, ("b, BREAKFAST", 1.0)],
    "BREAK BREAK a": [BREAK, BREAK, ("a", 1.0)],
    "(a BREAK b:1.2)": [("a", 1.2), BREAK, ("b", 1.2)],
    "a break b": [("a break b", 1.0)],
}


@pytest.mark.parametrize("prompt", TABLE)
def test_pieces_and_weights(prompt):
    found = parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in TABLE[prompt]]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in TABLE[prompt]], rel=1e-12)
    assert [piece is BREAK for piece in found] == [piece is BREAK for piece in TABLE[prompt]]


@pytest.mark.parametrize("prompt, open_at", [("a (b", "(b"), ("[b [c]", "[b [c]"), ("a (b [c", "(b [c")])
def test_an_unclosed_bracket_is_remarked(prompt, open_at):
    lines = Prompt.parse(prompt).remarks
    assert lines[0] == f"the bracket at {open_at!r} is not closed" and len(lines) == 1 + (prompt == "a (b [c")


@pytest.mark.parametrize("almost", ["(red:1,3)", "(red)1.3", "(red)++", "(red)--"])
def test_weights_as_others_write_them_are_remarked(almost):
    assert Prompt.parse(f"a {almost} cat").remarks == (f"{almost!r} is no weight: write (word:1.3)",)


@pytest.mark.parametrize(
    "prompt", ["(red), 1.3", "(d:1.2), (x)", "f(x)-y", "C++ (a)", "(10:30)", "(a, b: 1)", r"a \(b\)1.3"]
)
def test_what_is_no_weight_is_not_remarked(prompt):
    assert Prompt.parse(prompt).remarks == ()


@pytest.mark.parametrize("prompt", [r"a \(b", "a (b) [c] (d:1.2)", "x) y]", "a_(b)", ":-)"])
def test_closed_and_escaped_brackets_say_nothing(prompt):
    assert Prompt.parse(prompt).remarks == ()


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("a cat AND a dog", "AND .* is not supported; write 'and'"),
        ("(a AND b:1.2)", "AND .* is not supported"),
        ("[a:b AND c:0.5]", "AND .* is not supported"),
        ("(x:1.2.3)", "'1.2.3' is not a number"),
        ("[a:(x:.):3]", "'.' is not a number"),
        ("(x:1000)", "the weight 1000 of 'x' is beyond 100"),
        ("(" * 60 + "x", "is beyond 100"),
        ("(x:" + "9" * 400 + ")", "the weight inf"),
        ("([" * 51 + "x", "nested more than 100 deep"),
        ("(" * 100_000, "nested more than 100 deep"),
    ],
)
def test_what_is_refused(prompt, said):
    with pytest.raises(ConfigError, match=f"^negative_prompt: .*{said}"):
        Prompt.parse(prompt, where="negative_prompt")


@pytest.mark.parametrize("prompt", ["a cat and a dog", "a SAND castle", "ANDROID, a BAND"])
def test_only_the_word_in_capitals_composes(prompt):
    assert parse(prompt) == [(prompt, 1.0)]


@pytest.mark.parametrize("part", [" ", "(a)", "a]", ":1", ":1 ", "\\(", "BREAK ", "(a:1.5) [b] ", "([a:b:3])"])
def test_time_grows_with_length_alone(part):
    """Processor time of 40 times the length: well below the 1,600 times of a quadratic parser."""

    def seconds(length):
        prompt = part * (length // len(part))
        start = time.process_time()
        Prompt.parse(prompt)
        parse(prompt)
        return time.process_time() - start

    short = min(seconds(1_000) for _ in range(3))
    assert min(seconds(40_000) for _ in range(3)) < 200 * short + 0.2
