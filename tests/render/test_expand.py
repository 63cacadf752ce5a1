"""Prompt templates: each form, drawn by the seed alone, and what is refused by name."""

import collections
import hashlib
import itertools
import subprocess
import sys

import pytest

from ldm.errors import ConfigError
from ldm.render.prompts.templates import Wildcards, expand


def drawn(template, seeds=300, wildcards=None):
    wildcards = wildcards or Wildcards()
    return collections.Counter(expand(template, seed, wildcards) for seed in range(seeds))


@pytest.fixture
def wildcards(tmp_path):
    files = {
        "season.txt": "# four\nsummer\n\n{autumn|fall}\r\n  winter  \nspring",
        "my_colours/warm.txt": "3::red\norange",
        "my_colours/cold.txt": "blue",
        "clothes.txt": "a __my_colours/warm__ hat",
        "loop.txt": "x __loop__",
        "bomb.txt": "__bomb2____bomb2____bomb2____bomb2____bomb2____bomb2____bomb2____bomb2__",
        "bomb2.txt": "__bomb3____bomb3____bomb3____bomb3____bomb3____bomb3____bomb3____bomb3__",
        "bomb3.txt": "__bomb4____bomb4____bomb4____bomb4____bomb4____bomb4____bomb4____bomb4__",
        "bomb4.txt": "{a|b}" * 20,
        "long.txt": "y" * 60_000,
        "empty.txt": "# nothing\n\n",
        "broken.txt": "fine\n{a|b\n",
        "binary.txt": b"\xff\xfe",
    }
    for name, content in files.items():
        path = tmp_path / "wild" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "secret.txt").write_text("secret")
    return Wildcards(tmp_path / "wild")


@pytest.mark.parametrize(
    "template, results",
    [
        ("a {red|blue} cat", {"a red cat", "a blue cat"}),
        ("{very |}big", {"very big", "big"}),
        ("{x}", {"x"}),
        ("{2$$a|b|c}", {"a, b", "b, a", "a, c", "c, a", "b, c", "c, b"}),
        ("{2$$ and $$a|b}", {"a and b", "b and a"}),
        ("{1-2$$+$$ a | b }", {"a", "b", "a+b", "b+a"}),
        ("{-2$$/$$a|b}", {"a", "b", "a/b", "b/a"}),
        ("{1-$$/$$a|b}", {"a", "b", "a/b", "b/a"}),
        ("{9$$/$$a|b}", {"a/b", "b/a"}),
        ("{0-1$$a}", {"", "a"}),
        ("{{a|b}{c|d}|e}", {"ac", "ad", "bc", "bd", "e"}),
        ("{0::a|1::b|.5::c}", {"b", "c"}),
        ("{a{b|c}", None),
        ("a|b {c|d}|e", {"a|b c|e", "a|b d|e"}),
        ("100$ {a|b}$", {"100$ a$", "100$ b$"}),
        ("(x:1.2) [y|z] <lora:{a|b}:0.5>", {"(x:1.2) [y|z] <lora:a:0.5>", "(x:1.2) [y|z] <lora:b:0.5>"}),
    ],
)
def test_each_form_gives_all_its_results_and_no_other(template, results):
    if results is None:
        with pytest.raises(ConfigError, match="not closed"):
            drawn(template)
    else:
        assert set(drawn(template)) == results


@pytest.mark.parametrize(
    "template, text",
    [
        (r"\{a|b\}", "{a|b}"),
        (r"{a\|b}", "a|b"),
        (r"\__x\__", "__x__"),
        (r"{0.5\::a}", "0.5::a"),
        (r"{2\$$a}", "2$$a"),
        (r"\(x\) \[y\] \\ \n", r"\(x\) \[y\] \\ \n"),
        (r"{\\}", r"\\"),
        ("a __ b __ c ____ _x_", "a __ b __ c ____ _x_"),
        ("plain", "plain"),
        ("", ""),
    ],
)
def test_a_backslash_escapes_and_other_backslashes_stay(template, text):
    assert drawn(template, 3) == {text: 3}


def test_weights_are_shares():
    counts = drawn("{3::a|b}", 4000)  # 3000 expected, standard deviation 27
    assert abs(counts["a"] - 3000) < 4 * 27.4
    pairs = drawn("{2$$a|b|c}", 3000)
    assert all(abs(count - 500) < 4 * 20.4 for count in pairs.values())


def test_wildcards(wildcards):
    assert set(drawn("__season__!", 300, wildcards)) == {"summer!", "autumn!", "fall!", "winter!", "spring!"}
    assert set(drawn("__clothes__", 100, wildcards)) == {"a red hat", "a orange hat"}
    assert set(drawn("__my_colours/*__", 200, wildcards)) == {"red", "orange", "blue"}
    assert abs(drawn("__my_colours/warm__", 2000, wildcards)["red"] - 1500) < 4 * 19.4
    both = {"red-orange", "orange-red"}
    assert set(drawn("{2$$-$$__my_colours/warm__}", 50, wildcards)) == both  # two different lines


@pytest.mark.parametrize(
    "template, said",
    [
        ("{a|b", "the { at character 1 is not closed"),
        ("x {a|{b}", "the { at character 3 is not closed"),
        ("a}", "a } without a { at character 2"),
        ("{0::a|0::b}", "weight 0"),
        ("{3-2$$a|b}", "no range"),
        ("${x=a} ${x}", "variables are not supported"),
        ("__season(x=y)__", "variables are not supported"),
        ("{" * 5000, "more than 20 braces"),
        ("__seasn__", "did you mean 'season'"),
        ("__my_colours/../../secret__", "is no name of a file"),
        ("__my_colours__", "there is no wildcard"),
        ("__loop__", "more than 20 wildcards in each other (… loop > loop"),
        ("__bomb__", "more than 10,000 choices"),
        ("__long__ __long__", "more than 100,000 characters"),
        ("{2$$__long__}{__long__}", "more than 100,000 characters"),
        ("__empty__", "is empty"),
        ("__broken__", "broken.txt:2: __broken__: the { at character 1"),
        ("__binary__", "cannot be read"),
        ("__" + "x" * 5000 + "__", "is no name of a file"),
    ],
)
def test_what_is_refused(template, said, wildcards):
    with pytest.raises(ConfigError) as caught:
        expand(template, 0, wildcards)
    assert said in str(caught.value) and len(str(caught.value)) < 500


def test_wildcards_need_their_folder(tmp_path):
    with pytest.raises(ConfigError, match="no folder to look in; give --wildcards"):
        expand("__x__", 0, Wildcards())
    with pytest.raises(ConfigError, match="is no folder"):
        Wildcards(tmp_path / "missing")


def expected(seed):
    """{a|b|c|d} {3$$-$$e|f|g|h} {0.2::i|j} by the rule: sha256 of seed, purpose and the draw's number."""
    hashes = (hashlib.sha256(f"{seed}:prompt:{count}".encode()).hexdigest() for count in itertools.count(1))
    draws = ((int(text[:16], 16) >> 11) / 2**53 for text in hashes)
    first, rest = "abcd"[int(next(draws) * 4)], list("efgh")
    three = [rest.pop(int(next(draws) * len(rest))) for _ in range(3)]
    return f"{first} {'-'.join(three)} {'i' if next(draws) * 1.2 < 0.2 else 'j'}"


def test_the_draws_never_change():
    """Another Python, machine or release must draw the same."""
    template = "{a|b|c|d} {3$$-$$e|f|g|h} {0.2::i|j}"
    texts = [expand(template, seed, Wildcards()) for seed in range(50)]
    assert texts == [expected(seed) for seed in range(50)] and len(set(texts)) > 30
    code = "import sys; from ldm.render.prompts.templates import *; print(expand(sys.argv[1], 2, Wildcards()), end='')"
    done = subprocess.run([sys.executable, "-c", code, template], capture_output=True, text=True, check=True)
    assert done.stdout == texts[2]


def test_prompt_and_negative_prompt_draw_apart():
    wildcards = Wildcards()
    pairs = {(expand("{a|b}", s, wildcards), expand("{a|b}", s, wildcards, "negative_prompt")) for s in range(40)}
    assert len(pairs) == 4
