"""Settings from text: what is accepted, and that everything else is one line that says where."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest

from ldm.config import build, require
from ldm.errors import ConfigError
from ldm.settings_files import load, override
from tests.anew import write_anew


@dataclass(frozen=True)
class Inner:
    width: int = 8
    rates: tuple[float, ...] = (0.1,)

    def __post_init__(self):
        require(self.width > 0, f"must be positive, not {self.width}", "width")


@dataclass(frozen=True)
class Outer:
    steps: int
    rate: float = 0.5
    name: str | None = None
    on: bool = False
    kind: Literal["plain", "fancy"] = "plain"
    pair: tuple[int, int] = (1, 2)
    inner: Inner = Inner()
    weights: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


GOOD = Outer(
    3, 1.0, "x", True, "fancy", (4, 5), Inner(9, (1.0, 2.5)), {"a": 1.0}, {"deep": {"list": [1, None, "t"], "b": False}}
)
YAML = """
steps: 3
rate: 1
name: x
on: true
kind: fancy
pair: [4, 5]
inner:
  width: 9
  rates: [1, 2.5]
weights: {a: 1}
extra: {deep: {list: [1, null, t], b: false}}
""".replace("\non:", '\n"on":')
TOML = """
steps = 3
rate = 1
name = "x"
on = true
kind = "fancy"
pair = [4, 5]
weights = {a = 1}
[inner]
width = 9
rates = [1, 2.5]
[extra.deep]
list = [1, "t"]
b = false
"""
JSON = """{"steps": 3, "rate": 1, "name": "x", "on": true, "kind": "fancy", "pair": [4, 5],
"inner": {"width": 9, "rates": [1, 2.5]}, "weights": {"a": 1},
"extra": {"deep": {"list": [1, null, "t"], "b": false}}}"""


@pytest.fixture
def read(tmp_path):
    """A function (text, suffix) -> what `load` makes of it."""

    def read(text, suffix=".yaml"):
        path = tmp_path / f"settings{suffix}"
        write_anew(path, text if isinstance(text, bytes) else text.encode())
        return load(path)

    return read


@pytest.mark.parametrize(("text", "suffix"), [(YAML, ".yaml"), (YAML, ".YML"), (TOML, ".toml"), (JSON, ".json")])
def test_every_format_gives_the_same_settings(text, suffix, read):
    built = build(Outer, read(text, suffix))
    if suffix == ".toml":  # which has no null
        built.extra["deep"]["list"].insert(1, None)
    assert built == GOOD
    assert isinstance(built.rate, float) and isinstance(built.inner.rates[0], float)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_file_is_no_settings(text, read):
    assert read(text) == {}


@pytest.mark.parametrize(("text", "suffix"), [("a: 1", ".yaml"), ("a = 1", ".toml"), ('{"a": 1}', ".json")])
def test_a_byte_order_mark_is_no_part_of_the_text(text, suffix, read):
    assert read(b"\xef\xbb\xbf" + text.encode(), suffix) == {"a": 1}


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "1E-3", ".1e-2", "+1e-3", "0.001", "10_0e-5"])
def test_yaml_numbers_with_an_exponent_are_numbers(text, read):
    assert read(f"a: {text}\nb: [{text}]") == {"a": pytest.approx(0.001), "b": [pytest.approx(0.001)]}
    assert override({}, [f"a={text}"])["a"] == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"stepps": 1}, "unknown setting 'stepps'; did you mean 'steps'?"),
        ({"steps": 1, 7: 1}, "unknown setting 7; choose from: steps, rate"),
        ({"steps": 1, "inner": {"widht": 1}}, "inner: unknown setting 'widht'; did you mean 'width'?"),
        ({}, "setting 'steps' is missing"),
        ({"steps": "3"}, "steps: expected int, got '3'"),
        ({"steps": True}, "steps: expected int, got True"),
        ({"steps": 1.5}, "steps: expected int, got 1.5"),
        ({"steps": float("nan")}, "steps: expected int, got nan"),
        ({"steps": None}, "steps: expected int, got None"),
        ({"steps": [1]}, r"steps: expected int, got \[1\]"),
        ({"steps": 1, "rate": True}, "rate: expected float, got True"),
        ({"steps": 1, "rate": float("nan")}, "rate: nan is not a finite number"),
        ({"steps": 1, "rate": float("-inf")}, "rate: -inf is not a finite number"),
        ({"steps": 1, "rate": 10**400}, "rate: 10+… is not a finite number"),
        ({"steps": 1, "name": 5}, "name: expected str, got 5"),
        ({"steps": 1, "name": 1 << 20000}, "name: expected str, got an int of too many digits"),
        ({"steps": 1, "on": 1}, "on: expected bool, got 1"),
        ({"steps": 1, "on": "yes"}, "on: expected bool, got 'yes'"),
        ({"steps": 1, "kind": "fanzy"}, "kind: 'fanzy' is not allowed; did you mean 'fancy'?"),
        ({"steps": 1, "kind": ["fancy"]}, r"kind: \['fancy'\] is not allowed"),
        ({"steps": 1, "pair": [1]}, "pair: expected 2 values, got 1"),
        ({"steps": 1, "pair": [1, "b"]}, r"pair\[1\]: expected int, got 'b'"),
        ({"steps": 1, "pair": "12"}, r"pair: expected tuple\[int, int\], got '12'"),
        ({"steps": 1, "pair": 3}, "pair: expected tuple"),
        ({"steps": 1, "inner": 3}, "inner: expected a group of settings, got 3"),
        ({"steps": 1, "inner": None}, "inner: expected a group of settings, got None"),
        ({"steps": 1, "inner": {"rates": [1, None]}}, r"inner.rates\[1\]: expected float, got None"),
        ({"steps": 1, "inner": {"width": -1}}, "width: must be positive, not -1"),
        ({"steps": 1, "weights": [1]}, r"weights: expected dict\[str, float\]"),
        ({"steps": 1, "weights": {"a": float("inf")}}, "weights.a: inf is not a finite number"),
        ([1], r"Outer: expected a group of settings, got \[1\]"),
    ],
)
def test_wrong_settings_are_named(values, told):
    with pytest.raises(ConfigError, match=told) as caught:
        build(Outer, values)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_where_the_settings_came_from_is_told():
    with pytest.raises(ConfigError, match=r"^model\.inner\.width: expected int"):
        build(Outer, {"steps": 1, "inner": {"width": "a"}}, "model")
    with pytest.raises(ConfigError, match=r"^model\.inner: unknown setting 'x'"):
        build(Outer, {"steps": 1, "inner": {"x": "a"}}, "model")


def test_what_fits_is_taken():
    assert build(Outer, {"steps": 3.0}) == Outer(3)
    assert build(Outer, {"steps": 1, "inner": Inner(5)}).inner == Inner(5)
    assert build(Outer, {"steps": 1, "name": None, "inner": {"rates": []}}).inner.rates == ()
    assert build(Outer, {"steps": 0, "rate": 0, "on": False}) == replace(Outer(0), rate=0.0)


@pytest.mark.parametrize(
    ("text", "suffix", "told"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", ".yaml", r"settings.yaml:3:2: "),
        ("a: 1\n  b: 2\n", ".yaml", r"settings.yaml:2:4: mapping values are not allowed"),
        ("a: 'open\n", ".yaml", r"settings.yaml:2:1: "),
        ("a:\n\t- 1\n", ".yaml", r"settings.yaml:2:1: "),
        ("a: 1\nbc: 2\nbc: 3\n", ".yaml", r"settings.yaml:3:1: duplicate key 'bc'"),
        ("a:\n  b: {c: 1, c: 2}\n", ".yaml", r"settings.yaml:2:13: duplicate key 'c'"),
        ("a: &x [1]\nb: *x\n", ".yaml", r"settings.yaml:2:4: aliases are not allowed"),
        ("a: 1\n<<: {a: 2}\n", ".yaml", r"settings.yaml:2:1: "),
        ("a: !!python/object/apply:os.system [ls]\n", ".yaml", r"settings.yaml:1:4: could not determine a constructor"),
        ("a: !!bool maybe\n", ".yaml", r"settings.yaml: bad YAML"),
        ("a: !!int ''\n", ".yaml", r"settings.yaml: bad YAML"),
        ("a: !!timestamp x\n", ".yaml", r"settings.yaml: bad YAML"),
        ("a: 1\nb: x\x00y\n", ".yaml", r"settings.yaml:2:5: the character '\\x00' is not allowed"),
        ("? [1]\n: 2\n", ".yaml", r"settings.yaml:1:3: found unhashable key"),
        ("a: " + "[" * 3000, ".yaml", r"settings.yaml: nested too deeply"),
        ("a: " + "9" * 5000, ".yaml", r"settings.yaml: bad YAML"),
        ("--- {a: 1}\n--- {b: 1}\n", ".yaml", r"settings.yaml:2:1: "),
        ("- 1\n", ".yaml", r"settings.yaml: the settings must be a mapping"),
        ("a = 1\nb = = 2\n", ".toml", r"settings.toml:2:5: bad TOML \(Invalid value\)"),
        ("a = 1\na = 2\n", ".toml", r"settings.toml:2:6: bad TOML \(Cannot overwrite a value\)"),
        ("a = " + "9" * 5000, ".toml", r"settings.toml: bad TOML"),
        ("a = " + "[" * 100_000, ".toml", r"settings.toml: nested too deeply"),
        ('{"a": 1,\n "b": }', ".json", r"settings.json:2:7: Expecting value"),
        ('{"a": 1, "a": 2}', ".json", r"settings.json: duplicate key 'a'"),
        ('{"a": ' + "9" * 5000 + "}", ".json", r"settings.json: bad JSON"),
        ('{"a": ' + "[" * 100_000, ".json", r"settings.json: nested too deeply"),
        ("[1]", ".json", r"settings.json: the settings must be a mapping"),
        (b"a: \xff\xfe\n", ".yaml", r"settings.yaml: cannot be read .*utf-8"),
        ("a: 1", ".ini", r"settings.ini: unknown settings format '.ini'; use .yaml"),
    ],
)
def test_bad_files_are_refused_with_the_place(text, suffix, told, read):
    with pytest.raises(ConfigError, match=told) as caught:
        read(text, suffix)
    assert "\n" not in str(caught.value)


def test_a_billion_laughs_are_refused_at_once(read):
    rows = ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match=r"settings.yaml:2:10: aliases are not allowed"):
        read("\n".join(rows))


@pytest.mark.parametrize("name", ["missing.yaml", "folder.yaml", "nul\0.yaml", "x" * 300 + ".yaml", "file.yaml/y.yaml"])
def test_paths_that_hold_no_settings(name, tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "file.yaml").touch()
    with pytest.raises(ConfigError):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=0", 0),
        ("a=-1", -1),
        ("a=true", True),
        ("a=null", None),
        ("a=", ""),
        ("a=x=y", "x=y"),
        ("a=[1, 1e-3, b]", [1, 0.001, "b"]),
        ("a=[]", []),
        ("a={b: 1, c: [2]}", {"b": 1, "c": [2]}),
        ("a='0'", "0"),
        ("a=2024-05-06", "2024-05-06"),
        ("a=/data/set #2", "/data/set #2"),
        ("a= 5 ", 5),
        ("a=1e", "1e"),
        ("a=häuser/東京", "häuser/東京"),
    ],
)
def test_values_of_overrides(text, value):
    got = override({"a": "old"}, [text])["a"]
    assert got == value and type(got) is type(value)


def test_overrides_reach_down_and_leave_the_original_alone():
    base = {"a": 1, "b": {"c": 2, "d": [3]}}
    assert override(base, ["b.c=5", "b.e.f=6", "g=7", "b.c=8"]) == {
        "a": 1,
        "b": {"c": 8, "d": [3], "e": {"f": 6}},
        "g": 7,
    }
    override(base, ["b={}"])["b"]["new"] = 1
    override(base, [])["b"]["d"].append(4)
    assert base == {"a": 1, "b": {"c": 2, "d": [3]}}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("steps", "'steps' is not KEY=VALUE; write for example steps=1000"),
        ("=5", "'=5' is not KEY=VALUE"),
        ("", "'' is not KEY=VALUE"),
        ("a.b=1", "a.b: 'a' holds a value, not a group of settings"),
        ("a=[1", "a:1:"),
        ("a={b: 1, b: 2}", "a:1:8: duplicate key 'b'"),
        ("a=*x", "a:1:1: aliases are not allowed"),
        ("a=@x", "a:1:1: found character '@'"),
    ],
)
def test_bad_overrides(text, told):
    with pytest.raises(ConfigError) as caught:
        override({"a": 1}, [text])
    assert told in str(caught.value) and "\n" not in str(caught.value)


BITS = ["!!int", "!!bool", "!!float ", "!!set", "!!omap", "!!map ", "!!binary ", "!!python/name:os.system", "&a ", "*a"]
BITS += ["<<: ", "\0", "\ufeff", "%YAML 9\n", "---\n", "...\n", "'", '"', "[", "]", "{", "}", ":", ",", "-", "? ", "|"]
BITS += ["0x" + "F" * 5000, "9" * 5000, "1e999", ".nan", "NaN", "-Infinity", "é", "\u2028", "[" * 200, "{a: " * 200]
BITS += ["2020-99-99", "1:2:3", "=", "\t", "\r", "\n  ", "0o8", "0b2", "\\ud800", "true", "null", "~", "#"]


def mutant(text: str, draw: random.Random) -> str:
    for _ in range(draw.randint(1, 3)):
        i, choice = draw.randrange(len(text) + 1), draw.random()
        if choice < 0.3:
            text = text[:i] + text[i + draw.randint(1, 8) :]
        elif choice < 0.75:
            text = text[:i] + draw.choice(BITS) + text[i:]
        else:
            j = draw.randrange(len(text) + 1)
            text = text[:i] + text[j : j + 12] + text[i:]
    return text


@pytest.mark.parametrize(("text", "suffix"), [(YAML, ".yaml"), (TOML, ".toml"), (JSON, ".json")])
def test_two_thousand_mutants_end_in_settings_or_in_one_line(text, suffix, read):
    draw, refused, built = random.Random(suffix), 0, 0
    for _ in range(2000):
        try:
            values = read(mutant(text, draw), suffix)
            assert isinstance(values, Mapping)
            built += isinstance(build(Outer, values), Outer)
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused + built == 2000 and refused > 1000 and built > 20


def test_two_thousand_mutant_overrides():
    draw = random.Random(0)
    for _ in range(2000):
        text = mutant("inner.rates=[1, 2.5e-3]", draw)
        try:
            assert override({"steps": 1}, [text])["steps"] == 1
        except ConfigError as error:
            assert "\n" not in str(error)
