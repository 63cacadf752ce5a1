"""Metadata, captions, tars and parquet files with damage of all kinds: samples, counts that add up, or DataError."""

import io
import json
import random
import tarfile

import pytest
from PIL import Image

from ldm.data.sources import open_source
from ldm.errors import DataError
from tests.anew import write_anew

COUNT = 200  # of each layout


def image():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "teal").save(buffer, "PNG")
    return buffer.getvalue()


def jsonl(folder):
    rows = [{"file_name": f"{i}.png", "text": ["a cat", "näht"][: i + 1]} for i in range(3)]
    return folder / "metadata.jsonl", "\n".join(map(json.dumps, rows)).encode()


def csv(folder):
    return folder / "metadata.csv", 'file_name,text\n0.png,"a, b"\n1.png,näht\n2.png,c\n'.encode()


def caption(folder):
    return folder / "0.txt", "a cat\r\nnäht\n\n".encode()


def metadata_parquet(folder):
    return folder / "metadata.parquet", table({"file_name": ["0.png", "1.png", "2.png"], "text": ["a", "b", "c"]})


def parquet(folder):
    for path in folder.glob("*.png"):
        path.unlink()
    rows = [{"bytes": image(), "path": None}] * 3
    return folder / "a.parquet", table({"image": rows, "text": ["a", "b", None]})


def tar(folder):
    for path in folder.glob("*.png"):
        path.unlink()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in (("1.png", image()), ("1.txt", b"a"), ("2.png", image()), ("2.json", b'{"text": "b"}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return folder / "a.tar", buffer.getvalue()


def table(columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


WORDS = (
    b"\0",
    b"..",
    b"/etc/passwd",
    b'"',
    b",",
    b"\n",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"{",
    b"]",
    b"null",
    b"1e999",
    b"\\u0000",
)


def mutant(draw, data):
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(5)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + draw.randint(1, 40)]
        elif kind == 3:
            data[at:at] = draw.choice(WORDS)
        else:
            data[at : at + 4] = draw.randbytes(4)
    return bytes(data)


@pytest.mark.parametrize("layout", [jsonl, csv, caption, metadata_parquet, parquet, tar])
def test_damaged_files_give_samples_that_add_up_or_one_line(tmp_path, layout):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(image())
    path, data = layout(tmp_path)
    draw, outcomes = random.Random(0), {"read": 0, "refused": 0}
    for _ in range(COUNT):
        write_anew(path, mutant(draw, data))
        try:
            source = open_source(tmp_path)
            samples = [sample for sample, _ in source.validate()]
            counts = source.counts
            assert counts.found == counts.used + len(counts.skipped) + counts.aside.total()
            assert counts.used == len(samples) == len(source)
            assert counts.captions == sum(len(sample.captions) for sample in source)
            assert counts.missing + counts.empty == sum(not sample.captions for sample in source)
            source.require(max_bad=3, allow_empty_captions=True)
            outcomes["read"] += 1
        except DataError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0
