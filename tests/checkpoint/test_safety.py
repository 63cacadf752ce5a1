"""Pickles and malformed safetensors are refused from their first bytes, with one line and bounded work."""

import gc
import json
import pickle
import struct
import time
import timeit
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from ldm.checkpoint.safety import MAX_HEADER, read_header, read_json, refuse_pickle
from ldm.errors import ModelError
from tests.anew import write_anew

GOOD = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((), np.int64)}, {"format": "pt"})


def packed(table, data=b"", length=None) -> bytes:
    raw = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(begin, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


MALFORMED = {
    "empty": (b"", "has no header"),
    "short": (b"\x01\x02", "has no header"),
    "truncated": (GOOD[:-3], "is truncated"),
    "cut in the header": (GOOD[:40], "does not fit"),
    "trailing bytes": (GOOD + b"x", "bytes after its last tensor"),
    "length beyond the file": (packed({}, length=1 << 40), "does not fit"),
    "no table": (packed([1]), "not a table"),
    "no JSON": (packed(b"{'a': 1}"), "not valid JSON"),
    "not UTF-8": (packed(b'{"\xff": 1}'), "not valid JSON"),
    "deep": (packed(b'{"a":' + b"[" * 200_000), "not valid JSON"),
    "overlap": (packed({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"), "'b' overlaps"),
    "hole": (packed({"a": entry(0, 4), "b": entry(6, 8)}, b"12345678"), "'b' follows a hole"),
    "first hole": (packed({"a": entry(2, 4)}, b"1234"), "'a' follows a hole"),
    "duplicate": (packed(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 1)).encode(),) * 2), b"1"), "lists 'a' twice"),
    "unknown dtype": (packed({"a": entry(0, 4, dtype="X9")}, b"1234"), "unknown dtype 'X9'"),
    "size and shape": (packed({"a": entry(0, 4, [5])}, b"1234"), "does not match its shape"),
    "negative shape": (packed({"a": entry(0, 4, [-2, -2])}, b"1234"), "bad shape"),
    "boolean shape": (packed({"a": entry(0, 1, [True])}, b"1"), "bad shape"),
    "huge shape": (packed({"a": entry(0, 4, [1 << 62, 1 << 62])}, b"1234"), "is too large"),
    "huge shape of nothing": (packed({"a": entry(0, 0, [0, 1 << 62, 1 << 62])}), "is too large"),
    "control characters": (packed({"a\x1b[2J": entry(0, 4)}, b"1234"), "has the name"),
    "long name": (packed({"a" * 501: entry(0, 4)}, b"1234"), "of 501 characters"),
    "backward offsets": (packed({"a": entry(4, 0, [4])}, b"1234"), "does not match its shape"),
    "missing field": (packed({"a": {"dtype": "U8", "shape": [1]}}, b"1"), "is not dtype, shape"),
    "metadata": (packed({"__metadata__": {"a": 1}}), "metadata is not text"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_safetensors_are_refused_with_the_reason(tmp_path, name):
    content, reason = MALFORMED[name]
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=reason) as error:
        read_header(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_mutants_are_refused_in_one_line_or_sound(tmp_path):
    random, path, refused = np.random.default_rng(0), tmp_path / "w.safetensors", 0
    for _ in range(300):
        raw = bytearray(GOOD)
        for _ in range(random.integers(1, 4)):
            raw[random.integers(len(raw) - 32)] = random.integers(256)  # the last 32 bytes are numbers
        write_anew(path, raw[: random.integers(len(raw) // 2, 2 * len(raw))])
        try:
            read_header(path)
        except ModelError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            with safe_open(path, "np") as file:  # what we take, the library takes
                assert len(file.keys()) > 0
    assert 150 < refused < 300


def test_sound_header_is_read(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(GOOD)
    header = read_header(path)
    assert {name: (t.dtype, t.shape, t.size) for name, t in header.tensors.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("I64", (), 8),
    }
    assert header.metadata == {"format": "pt"} and header.size + 32 == len(GOOD)


@pytest.mark.parametrize("first", [b"\x80\x02", b"<", b"\x80\x04", b" <"])
def test_a_header_length_that_looks_like_another_format_is_no_reason_to_refuse(tmp_path, first):
    table = json.dumps({"a": entry(0, 1)}).encode()
    length = int.from_bytes(first.ljust(8, b"\0"), "little")
    assert length >= len(table)
    path = tmp_path / "w.safetensors"
    path.write_bytes(packed(table.ljust(length), b"1"))
    assert path.read_bytes().startswith(first) and list(read_header(path).tensors) == ["a"]


def test_a_header_beyond_the_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "w.safetensors"
    with path.open("wb") as handle:  # sparse: takes no room
        handle.write(struct.pack("<Q", MAX_HEADER + 1))
        handle.truncate(1 << 33)
    start = time.perf_counter()
    with pytest.raises(ModelError, match="larger than any model's"):
        read_header(path)
    assert time.perf_counter() - start < 1


COSTLY = {  # headers as large as is read, that would take long
    "entries": lambda n: b"{" + b",".join(b'"%x":{}' % i for i in range(n // 9)) + b"}",
    "lists": lambda n: b'{"a":[' + b"[]," * (n // 3 - 9) + b"1]}",
    "texts": lambda n: b'{"a":[' + b'"ab",' * (n // 5 - 9) + b"1]}",
    "digits": lambda n: b'{"a":' + b"1" * (n - 9) + b"}",
    "metadata": lambda n: b'{"__metadata__":{' + b",".join(b'"%x":""' % i for i in range(n // 10)) + b"}}",
    "last one twice": lambda n: b"{" + b",".join(b'"%x":1' % (i % 99_000) for i in range(99_001)) + b"}",
    "just allowed": lambda n: json.dumps({f"{i:x}": entry(0, 0) for i in range(60_000)}).encode(),
}


@pytest.fixture
def plain_seconds():
    """CPU seconds that the machine needs, just now, for the plain JSON of the largest header that is allowed."""
    text = COSTLY["just allowed"](MAX_HEADER)
    gc.collect()
    gc.freeze()  # what other tests left behind is no work of ours
    yield max(timeit.repeat(lambda: json.loads(text), gc.enable, time.thread_time, repeat=3, number=1))
    gc.unfreeze()


@pytest.mark.parametrize("name", COSTLY)
def test_no_header_takes_long(tmp_path, name, plain_seconds):
    path = tmp_path / "w.safetensors"
    path.write_bytes(packed(COSTLY[name](MAX_HEADER)))
    start = time.thread_time()
    try:
        assert len(read_header(path).tensors) == 60_000 and name == "just allowed"
    except ModelError as error:
        assert len(str(error)) < 500
    assert time.thread_time() - start < 10 * plain_seconds  # the slowest takes five times as long; lists unbounded, 20


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("name", ["m.ckpt", "m.pt", "m.PTH", "m.bin", "m.safetensors", "m.SafeTensors"])
@pytest.mark.parametrize("form", ["zip", 0, 2, 4, 5])
def test_no_pickle_is_opened_under_any_name(tmp_path, name, form):
    marker, path = tmp_path / "ran", tmp_path / name
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Payload(marker)))
    else:
        path.write_bytes(pickle.dumps(Payload(marker), protocol=form))
    with pytest.raises(ModelError, match="pickle" if form or "safe" not in name.lower() else "safetensors") as error:
        read_header(path)
    assert not marker.exists() and "\n" not in str(error.value)


def test_a_pickle_is_judged_by_its_first_4_kb(tmp_path):
    path = tmp_path / "large.ckpt"
    with path.open("wb") as handle:
        handle.write(pickle.dumps(list(range(10_000))))
        handle.truncate(1 << 34)
    before = Path("/proc/self/io").read_text().split()
    with pytest.raises(ModelError, match="pickle"):
        refuse_pickle(path)
    after = Path("/proc/self/io").read_text().split()
    assert int(after[1]) - int(before[1]) < 4096 + 2048  # rchar; reading /proc itself counts a little


@pytest.mark.parametrize(
    "content, said",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"\0" * 257 + b"ustar\0", "tar archive"),
    ],
)
def test_other_things_under_the_name_are_named(tmp_path, content, said):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=said):
        read_header(path)


@pytest.mark.parametrize("text, said", [("{\n'a'}", ":2: is not valid JSON"), ("[1]", "not a table"), ("\xff", "read")])
def test_bad_json_is_named_with_its_line(tmp_path, text, said):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=said):
        read_json(path)
