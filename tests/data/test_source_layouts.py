"""The same images and captions in every layout become the same samples; what each layout has of its own is kept."""

import hashlib
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.sources import open_source
from ldm.errors import DataError

CAPTIONS = ["a red square", "näht, mit Komma", "a 'quoted' \"one\"", "猫", "last one"]
LAYOUTS = {}


def layout(function):
    """Lists function(folder, {name: bytes}, captions) -> what is given to open_source."""
    LAYOUTS[function.__name__] = function
    return function


def five_images():
    """{name: bytes}, in the order of their names."""
    files = {}
    for i in range(len(CAPTIONS)):
        buffer = io.BytesIO()
        Image.new("RGB", (8 + i, 8), (40 * i, 9, 200)).save(buffer, "PNG")
        files[f"{i:04d}.png"] = buffer.getvalue()
    return files


def write_images(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


@layout
def txt(folder, files, captions):
    write_images(folder, files)
    for name, text in zip(files, captions):
        (folder / name).with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    return folder


@layout
def caption(folder, files, captions):
    write_images(folder, files)
    for name, text in zip(files, captions):
        (folder / name).with_suffix(".caption").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    return folder


@layout
def jsonl(folder, files, captions):
    write_images(folder, files)
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in zip(files, captions)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@layout
def csv_below_train_and_test(folder, files, captions):
    import csv

    write_images(folder / "train" / "images", files)
    write_images(folder / "test", {"other.png": next(iter(files.values()))})
    for split, rows in (("train", zip([f"images/{n}" for n in files], captions)), ("test", [("other.png", "no")])):
        with (folder / split / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("image_file_name", "prompt"), *rows])
    return folder


@layout
def metadata_parquet(folder, files, captions):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_images(folder, files)
    pq.write_table(pa.table({"file_name": list(files), "caption": list(captions)}), folder / "metadata.parquet")
    return folder


@layout
def parquet_of_structs(folder, files, captions):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True)
    images = [{"bytes": data, "path": name} for name, data in files.items()]
    for split, part in (("train-00000-of-00002", slice(0, 3)), ("train-00001-of-00002", slice(3, None))):
        table = pa.table({"image": images[part], "text": list(captions)[part]})
        pq.write_table(table, folder / "data" / f"{split}.parquet", row_group_size=2)
    pq.write_table(pa.table({"image": images[:1], "text": ["held out"]}), folder / "data" / "test-00000.parquet")
    return folder


@layout
def one_parquet_of_bytes(folder, files, captions):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    pq.write_table(pa.table({"jpg": list(files.values()), "TEXT": list(captions)}), folder / "a.parquet")
    return folder / "a.parquet"


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@layout
def tars_with_txt(folder, files, captions):
    for shard, part in (("00000.tar", slice(0, 3)), ("00001.tar", slice(3, None))):
        members = []
        for (name, data), text in list(zip(files.items(), captions))[part]:
            key = name.split(".")[0]
            members += [(f"{key}.json", b'{"width": 8}'), (name, data), (f"{key}.txt", text.encode())]
        write_tar(folder / shard, members)
        (folder / shard).with_suffix(".parquet").write_bytes(b"what img2dataset leaves beside them")
    return folder


@layout
def one_tar_with_json(folder, files, captions):
    members = []
    for (name, data), text in zip(files.items(), captions):
        key = "long/" * 30 + name.split(".")[0]
        members += [(f"{key}.png", data), (f"{key}.json", json.dumps({"caption": text}).encode())]
    write_tar(folder / "set.tar", members)
    return folder / "set.tar"


def library_set(files, captions):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": data, "path": None} for data in files.values()], "text": list(captions)}
    return datasets.Dataset.from_dict(rows, features=features)


@layout
def saved_set(folder, files, captions):
    library_set(files, captions).save_to_disk(str(folder))
    return folder


@layout
def saved_splits(folder, files, captions):
    import datasets

    held = library_set(dict(list(files.items())[:1]), ["held out"])
    datasets.DatasetDict({"test": held, "train": library_set(files, captions)}).save_to_disk(str(folder))
    return folder


@layout
def kohya(folder, files, captions):
    return txt(folder / "10_thing", files, captions).parent


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def state(folder):
    """Everything about the files below a folder that a reader could change."""
    files = sorted(p for p in Path(folder).rglob("*"))
    stats = [(str(p), os.lstat(p).st_mtime_ns, os.lstat(p).st_size, os.lstat(p).st_mode) for p in files]
    return stats, [hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()]


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_yields_the_same_samples(tmp_path, name):
    """Fault C 36 too: nothing of the user's is changed."""
    files = five_images()
    data = LAYOUTS[name](tmp_path / "set", files, CAPTIONS)
    before = state(tmp_path)
    source = open_source(data, split="train")
    source.require(max_bad=0)
    assert len(source) == 5 and [sample.captions for sample in source] == [(text,) for text in CAPTIONS]
    for i in (0, 4, 2, 1, 3):  # in any order
        with source[i].open() as file:
            assert file.read() == list(files.values())[i]
        assert np.asarray(source[i].image())[0, 0].tolist() == [40 * i, 9, 200]
        assert (source[i].header().width, source[i].header().height) == (8 + i, 8)
    again = pickle.loads(pickle.dumps(source)) if "saved" not in name else open_source(data)
    assert [(s.id, s.captions, s.repeats) for s in again] == [(s.id, s.captions, s.repeats) for s in source]
    assert len({sample.id for sample in source}) == 5 and not any(str(tmp_path) in s.id for s in source)
    counts = source.counts
    assert counts.found == counts.used + len(counts.skipped) + counts.aside.total() and counts.captions == 5
    assert [sample for sample, _ in source.validate()] == list(source)
    assert {sample.repeats for sample in source} == {10 if name == "kohya" else 1}
    assert state(tmp_path) == before
    lines = source.lines(cut=lambda text: text[12:])
    assert len(source.layout) < 120 and "\n" not in source.layout and source.layout in lines[0]
    assert sum(text in line for line in lines[-3:] for text in CAPTIONS[:3]) == 3
    assert "2 captions are too long for the text encoder" in "\n".join(lines) and "loses 'mma'" in "\n".join(lines)


def test_several_captions_are_alternatives(tmp_path):
    files = five_images()
    several = [["one", "two"], ["a"], ["b", " ", "c"], [], ["d"]]
    txt(tmp_path / "txt", files, ["\n".join(texts) + "\n\n" for texts in several])
    import pyarrow as pa
    import pyarrow.parquet as pq

    jsonl(tmp_path / "jsonl", files, several)
    images = [{"bytes": data, "path": None} for data in files.values()]
    pq.write_table(pa.table({"image": images, "captions": several}), tmp_path / "a.parquet")
    members = list(files.items())
    members += [(n.replace("png", "txt"), "\n".join(texts).encode()) for n, texts in zip(files, several)]
    write_tar(tmp_path / "a.tar", sorted(members))
    for data in ("txt", "jsonl", "a.parquet", "a.tar"):
        source = open_source(tmp_path / data)
        assert [s.captions for s in source] == [("one", "two"), ("a",), ("b", "c"), (), ("d",)], data
        assert (source.counts.captions, source.counts.empty, source.counts.missing) == (6, 1, 0)
        with pytest.raises(DataError, match=r"1 of 5 images have no caption \(0 missing, 1 empty\): .*3.*allow empty"):
            source.require()
        source.require(allow_empty_captions=True)


def test_a_row_more_for_an_image_is_an_alternative(tmp_path):
    jsonl(tmp_path, five_images(), CAPTIONS)
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "0000.png", "text": "another"}\n{"file_name": "0000.png", "text": "another"}')
    source = open_source(tmp_path)
    assert source[0].captions == (CAPTIONS[0], "another") and len(source) == 5
    assert "2 rows name an image again: their captions are alternatives" in source.counts.notes


def test_metadata_beats_sidecars_with_a_counted_warning(tmp_path):
    files = five_images()
    txt(tmp_path, files, ["from a file"] * 5)
    jsonl(tmp_path, dict(list(files.items())[:3]), CAPTIONS)
    write_images(tmp_path, files)
    source = open_source(tmp_path)
    assert [s.captions[0] for s in source] == CAPTIONS[:3]
    assert "3 caption files beside images with a row are ignored: the row counts" in source.counts.notes
    assert source.counts.aside == {"without a row in the metadata": 2} and source.counts.found == 5


def test_the_split_that_is_asked_for_is_read(tmp_path):
    files = five_images()
    for name, expected in (("csv_below_train_and_test", "no"), ("parquet_of_structs", "held out")):
        data = LAYOUTS[name](tmp_path / name, files, CAPTIONS)
        assert [s.captions for s in open_source(data, split="test")] == [(expected,)]
        with pytest.raises(DataError, match=r"has no split 'validation'; there is test, train"):
            open_source(data, split="validation")
    data = saved_splits(tmp_path / "saved", files, CAPTIONS)
    assert [s.captions for s in open_source(data, split="test")] == [("held out",)]
    with pytest.raises(DataError, match="has no split 'other'"):
        open_source(data, split="other")
    with pytest.raises(DataError, match="has no split 'test'; there is none"):
        open_source(txt(tmp_path / "plain", files, CAPTIONS), split="test")


def test_kohya_s_repeats_and_class_names(tmp_path):
    files = list(five_images().items())
    write_images(tmp_path / "10_red cat", dict(files[:2]))
    write_images(tmp_path / "3_dog" / "more", dict(files[2:4]))
    (tmp_path / "10_red cat" / "0001.txt").write_text("its own")
    source = open_source(tmp_path)
    assert [(s.captions, s.repeats) for s in source] == [(("red cat",), 10), (("its own",), 10)] + [(("dog",), 3)] * 2
    assert "repeats 3, 10" in source.layout and "3 captions are the names of kohya's folders" in source.counts.notes
    write_images(tmp_path / "others", dict(files[4:]))
    assert [(s.id, s.repeats) for s in open_source(tmp_path)] == [(s.id, s.repeats) for s in source]


def test_one_stem_with_two_suffixes_is_two_images(tmp_path):  # fault C 33
    data = txt(tmp_path, five_images(), CAPTIONS)
    Image.new("RGB", (9, 9)).save(data / "0000.JPG")
    source = open_source(data)
    assert [s.id for s in source][:2] == ["0000.JPG", "0000.png"] and len(source) == 6
    assert source[0].captions == source[1].captions == (CAPTIONS[0],)


def test_the_order_is_that_of_the_names_whatever_the_file_system_says(tmp_path, monkeypatch):
    names = ["b.png", "a/z.png", "a.png", "Z.png", "é.png", "e.png", "a/b/c.png", "ab.png"]
    data = next(iter(five_images().values()))
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    expected = [s.id for s in open_source(tmp_path)]
    assert expected == ["Z.png", "a.png", "ab.png", "b.png", "e.png", "é.png", "a/z.png", "a/b/c.png"]
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_exc):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert [s.id for s in open_source(tmp_path)] == expected


def test_large_row_groups_are_read_in_parts(tmp_path, monkeypatch):
    """Memory is bounded by the batch, not by the row group; going back re-reads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ldm.data.sources import tables

    monkeypatch.setattr(tables, "BATCH", 4000)
    rng = np.random.default_rng(0)
    blobs = [rng.bytes(1000) for _ in range(60)]
    table = pa.table({"image": [{"bytes": b, "path": None} for b in blobs], "text": [f"t{i}" for i in range(60)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=30, compression="none")
    source = open_source(tmp_path / "a.parquet")
    for i in [*range(60), 59, 3, 31, 30, 0]:
        with source[i].open() as file:
            assert file.read() == blobs[i]
        assert len(source.files[0].images.values) <= 4 and source[i].captions == (f"t{i}",)


@pytest.mark.parametrize("name", ["tars_with_txt", "parquet_of_structs", "txt"])
def test_workers_read_at_the_same_time_after_a_fork(tmp_path, name):
    import multiprocessing

    files = five_images()
    source = open_source(LAYOUTS[name](tmp_path / "set", files, CAPTIONS))
    source[1].image()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        sizes = pool.map(_width, [(source, i) for i in [0, 1, 2, 3, 4] * 4])
    assert sizes == [8, 9, 10, 11, 12] * 4


def _width(task):
    source, index = task
    return source[index].image().width


def test_what_is_no_set_is_said_in_one_line(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no parquet PAR1")
    pq.write_table(pa.table({"url": ["http://x"], "text": ["a"]}), tmp_path / "urls.parquet")
    write_tar(tmp_path / "silent.tar", [("1.png", next(iter(five_images().values())))])
    (tmp_path / "saved").mkdir()
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / "saved" / name).write_text("{")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.pdf").write_text("")
    for name, said in {
        "missing": "no such folder or file",
        "a.zip": "is a file; unpack it, and give the folder",
        "bad.tar": "is not a sound tar",
        "bad.parquet": "is not a sound parquet file",
        "urls.parquet": "has no column of images: the columns are 'url', 'text'",
        "silent.tar": "holds no captions: no .txt and no .json",
        "saved": "cannot be read as a saved set",
        "docs": "holds no images (1 .pdf)",
    }.items():
        with pytest.raises(DataError) as error:
            open_source(tmp_path / name).require()
        assert said in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_bad_rows_of_tars_and_tables_are_counted(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = five_images()
    images = [{"bytes": data, "path": None} for data in files.values()]
    images[1], images[2] = None, {"bytes": None, "path": "/etc/passwd"}
    images[3] = {"bytes": b"<html>", "path": None}
    pq.write_table(pa.table({"image": images, "text": ["a", "b", "c", "d", "e\0"]}), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert len(source) == 4 and len(list(source.validate())) == 1 == len(source)
    reasons = {"holds no image", "holds a path in place of an image", "is no image", "caption holds a NUL"}
    assert set(source.counts.reasons()) == reasons and source.counts.found == 5
    members = [("1.jpg", b""), ("1.txt", b"a"), ("2.png", files["0000.png"]), ("2.txt", b"caf\xe9")]
    members += [("3.png", files["0000.png"]), ("3.seg.png", files["0000.png"]), ("3.json", b"{"), ("4.txt", b"alone")]
    members += [("5.png", files["0000.png"]), ("5.txt", b"good")]
    write_tar(tmp_path / "a.tar", members)
    source = open_source(tmp_path / "a.tar")
    assert [sample.captions for sample, _ in source.validate()] == [("good",)]
    assert source.counts.found == 5 and sum(source.counts.reasons().values()) == 4
    assert {str(skip).rpartition("/")[2] for skip in source.counts.skipped} == {
        "1.jpg: is empty (0 bytes)",
        "2.txt: caption is not UTF-8 (byte 3)",
        "3.json: its .json is not JSON",
    }
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(b"good") - 600])
    with pytest.raises(DataError, match=r"cut|sound"):
        open_source(tmp_path / "cut.tar").require(max_bad=0)
