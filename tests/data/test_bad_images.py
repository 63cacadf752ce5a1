"""Sets with something wrong in them: right counts, named reasons, nothing changed (faults C 22-36, D 37-43)."""

import collections
import hashlib
import io
import os
import random
import socket
import struct
import zlib

import pytest
from PIL import Image

from ldm.data.sources import Sample, open_source
from ldm.errors import DataError

KINDS = {}  # name -> (function that makes it of a good image's path, reason)


def kind(reason):
    """Lists function(path of a good .png) that spoils it, with the reason that must be named."""

    def listed(function):
        KINDS[function.__name__] = (function, reason)
        return function

    return listed


def write(path, data):
    path.unlink()
    path.write_bytes(data)


def bomb(side):
    head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    sound = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + sound + struct.pack(">I", 9) + b"IDAT" + bytes(13)


@kind("is damaged or cut short")
def cut_png(path):
    write(path, path.read_bytes()[:-40])


@kind("is damaged or cut short")
def cut_jpeg(path):
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 90).save(buffer, "JPEG")
    write(path, buffer.getvalue()[:700])


@kind("is damaged or cut short")
def cut_webp(path):
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 90).save(buffer, "WEBP")
    write(path, buffer.getvalue()[:300])


@kind("is empty")
def empty(path):
    write(path, b"")


@kind("is no image")
def text(path):
    write(path, b"just words")


@kind("is no image")
def html(path):
    write(path, b"<html><body>404 Not Found</body></html>")


@kind("is of a kind that is not read")
def heic(path):
    write(path, b"\0\0\0\x20ftypheic\0\0\0\0mif1heic")


@kind("is too large an image")
def huge_bomb(path):
    write(path, bomb(60_000))


@kind("is too large an image")
def large_bomb(path):
    write(path, bomb(10_000))


@kind("is a link that leads nowhere")
def loop(path):
    path.unlink()
    path.symlink_to(path.name)


@kind("is a link that leads nowhere")
def dangling(path):
    path.unlink()
    path.symlink_to("nowhere.png")


@kind("is a link out of the folder")
def outward(path):
    path.rename(path.parents[1] / f"outside-{path.name}")
    path.symlink_to(path.parents[1] / f"outside-{path.name}")


@kind("is no file")
def pipe(path):
    path.unlink()
    os.mkfifo(path)


@kind("is no file")
def folder(path):
    path.unlink()
    path.mkdir()


@kind("caption is not UTF-8")
def caption_in_latin1(path):
    path.with_suffix(".txt").write_bytes(b"caf\xe9")


@kind("caption holds a NUL")
def caption_with_nul(path):
    path.with_suffix(".txt").write_bytes(b"a\0b")


def state(folder):
    """What every file is, without following links or opening pipes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = os.lstat(path)
        plain = path.is_file() and not path.is_symlink()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if plain else ""
        found[str(path)] = (stat.st_mode, stat.st_size, stat.st_mtime_ns, digest)
    return found


def spoilt_set(folder, count, bad):
    """`count` images with captions, `bad` of them spoilt in all kinds in turn; {path: reason}."""
    folder.mkdir()
    files, draw, expected = [], random.Random(0), {}
    for i in range(8):
        buffer = io.BytesIO()
        Image.effect_noise((24, 16 + i), 50).convert("RGB").save(buffer, "PNG")
        files.append(buffer.getvalue())
    for i in range(count):
        path = folder / f"{i:05d}.png"
        path.write_bytes(files[i % 8])
        path.with_suffix(".txt").write_text(f"image {i}")
    for n, i in enumerate(draw.sample(range(count), bad)):
        spoil, reason = list(KINDS.values())[n % len(KINDS)]
        spoil(folder / f"{i:05d}.png")
        expected[f"{i:05d}"] = reason
    return expected


def check_spoilt_set(folder, count, bad):
    assert len(KINDS) >= 15
    expected = spoilt_set(folder, count, bad)
    before = state(folder)
    source = open_source(folder)
    used = [sample.id for sample, _ in source.validate(Sample.image, desc="images")]
    counts = source.counts
    source.require(max_bad=0.05)
    assert state(folder) == before
    assert (counts.found, counts.used, len(counts.skipped)) == (count, count - bad, bad)
    assert len(source) == len(used) == counts.captions == count - bad and not counts.aside
    assert [sample.id for sample in source] == used
    named = {os.path.basename(skip.where).split(".")[0]: skip.reason for skip in counts.skipped}
    assert named == expected
    assert counts.reasons() == collections.Counter(expected.values())
    with pytest.raises(DataError, match=rf"{bad} of {count} cannot be used, 0 are allowed: .*is no file \d"):
        source.require(max_bad=0)
    with pytest.raises(DataError, match=rf"cannot be used, {bad - 1} are allowed"):
        source.require(max_bad=bad - 1)
    source.require(max_bad=bad)
    assert f"{count} found: {count - bad} used, {bad} skipped: " in source.lines()[1]


def test_two_hundred_images_of_sixteen_bad_kinds_are_counted_by_their_reasons(tmp_path):
    check_spoilt_set(tmp_path / "set", 640, 32)


@pytest.mark.slow
def test_ten_thousand_images_with_two_hundred_bad_ones(tmp_path):
    check_spoilt_set(tmp_path / "set", 10_000, 200)


def good(path, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "teal").save(path)
    return path


def refusal(folder, **options):
    with pytest.raises(DataError) as error:
        open_source(folder).require(**options)
    assert "\n" not in str(error.value) and error.value.exit_code == 2
    return str(error.value)


@pytest.mark.parametrize("suffix", [".text", ".TAGS", ".caption.txt", ".png.txt", ".cap", ".yaml"])
def test_captions_with_another_suffix_are_named(tmp_path, suffix):  # fault D 38
    for i in range(3):
        good(tmp_path / f"{i}.png")
        (tmp_path / f"{i}{suffix}").write_text("a cat")
    said = refusal(tmp_path, allow_empty_captions=True)
    assert f"has no captions: 3 images have a file *{suffix} beside them, which is not read; rename" in said


def test_what_stands_in_the_place_of_captions_is_named(tmp_path):  # faults D 37, 42
    good(tmp_path / "cat.png")
    assert "1 images, no metadata and no .txt or .caption beside them; write cat.txt" in refusal(tmp_path)
    (tmp_path / "readme.txt").write_text("about these images")
    assert "none of 1 caption files (readme.txt) has the name of an image" in refusal(tmp_path)
    (tmp_path / "metadata.json1").write_text("")
    assert "metadata.json1 is there: did you mean 'metadata.jsonl'?" in refusal(tmp_path)
    (tmp_path / "cat.txt").write_text(" \n\n")
    good(tmp_path / "dog.png")
    (tmp_path / "dog.txt").write_text("a dog")
    for i in range(15):
        good(tmp_path / f"{i:02d}.png")
    said = refusal(tmp_path)
    assert "16 of 17 images have no caption (15 missing, 1 empty): 00.png, 01.png," in said and "09.png, …;" in said
    open_source(tmp_path).require(allow_empty_captions=True)
    notes = open_source(tmp_path).counts.notes
    assert "1 caption files belong to no image: readme.txt" in notes
    assert "1 other files are ignored: 1 .json1" in notes


def test_files_of_other_kinds_are_counted(tmp_path):
    good(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    for name in (".DS_Store", "Thumbs.db", "b.heic", "c.psd", "._a.png", "LICENSE"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    good(tmp_path / ".cache" / "x.png")
    source = open_source(tmp_path)
    assert len(source) == 1 and source.counts.found == 3
    assert source.counts.reasons() == {"is of a kind that is not read": 2}
    assert "3 hidden files and folders are ignored" in source.counts.notes
    assert "2 other files are ignored: 1 .db, 1 no suffix" in source.counts.notes


def test_both_caption_files_are_noted_and_the_txt_is_read(tmp_path):
    good(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.caption").write_text("caption")
    source = open_source(tmp_path)
    assert source[0].captions == ("text",)
    assert "1 images have a .txt and a .caption: the .txt is read (a.png)" in source.counts.notes


def test_links_are_followed_inside_of_the_folder_alone(tmp_path):  # fault C 32
    data = tmp_path / "data"
    good(data / "sub" / "a.png")
    (data / "sub" / "a.txt").write_text("a")
    (data / "b.png").symlink_to("sub/a.png")
    (data / "b.txt").symlink_to("sub/a.txt")
    (data / "around").symlink_to(".")
    (data / "etc").symlink_to("/etc")
    (data / "c.txt").symlink_to("/etc/hostname")
    good(data / "c.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(data / "s.png"))
        source = open_source(data)
    assert [(s.id, s.captions) for s in source] == [("b.png", ("a",)), ("c.png", ()), ("sub/a.png", ("a",))]
    assert "1 images are links to others in the folder" in source.counts.notes
    said = "3 links to folders or out of the folder are not followed: around, c.txt, etc"
    assert said in source.counts.notes
    assert source.counts.reasons() == {"is no file": 1}
    (tmp_path / "entrance").symlink_to(data)
    assert len(open_source(tmp_path / "entrance")) == 3


def test_names_that_are_not_utf8_and_folders_that_cannot_be_listed(tmp_path):
    good(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    os.rename(os.fsencode(good(tmp_path / "x.png")), os.fsencode(tmp_path) + b"/caf\xe9.png")
    source = open_source(tmp_path)
    assert len(source) == 1 and source.counts.reasons() == {"has a name that is not UTF-8": 1}
    str(source.counts.skipped[0]).encode("utf-8")
    if os.getuid():
        (tmp_path / "locked").mkdir(mode=0)
        assert "locked: cannot be listed" in refusal(tmp_path)


def test_an_image_that_vanishes_or_changes_is_an_error_of_its_own(tmp_path):  # fault C 35
    for name in "abc":
        good(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    source = open_source(tmp_path)
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").unlink()
    os.mkfifo(tmp_path / "b.png")
    for index, said in ((0, "a.png: cannot be opened (No such file"), (1, "b.png: is no file")):
        with pytest.raises(DataError) as error:
            source[index].image()
        assert said in str(error.value)
    assert [sample.id for sample, _ in source.validate()] == ["c.png"]
    assert source.counts.reasons() == {"cannot be opened": 1, "is no file": 1} and source.counts.found == 3


def test_metadata_s_own_faults(tmp_path):  # fault D 41
    for name in ("a.png", "b.png", "sub/c.png"):
        good(tmp_path / name)
    (tmp_path / "deep").symlink_to("/etc")
    rows = tmp_path / "metadata.jsonl"

    def said(text):
        rows.write_text(text, encoding="utf-8", errors="surrogatepass")
        return refusal(tmp_path, max_bad=0)

    fine = '{"file_name": "a.png", "text": "a"}\n'
    assert "metadata.jsonl:2: file_name is a link out" in said(fine + '{"file_name": "deep/hostname", "text": "a"}')
    assert "metadata.jsonl:2: file_name leads out" in said(fine + '{"file_name": "sub\\\\..\\\\..\\\\x", "text": "a"}')
    assert "metadata.jsonl:2: file_name leads out" in said(fine + '{"file_name": "C:\\\\x.png", "text": "a"}')
    assert ":2: caption holds half a character" in said(fine + '{"file_name": "b.png", "text": "\\ud800"}')
    assert ":2: caption holds a NUL" in said(fine + '{"file_name": "b.png", "text": "a\\u0000"}')
    assert "holds no captions; write one line" in said('{"file_name": "a.png", "text": ""}')
    assert "metadata.jsonl:2: is not JSON" in said(fine + "[" * 100_000)
    assert "metadata.jsonl:2: is longer than a megabyte" in said(fine + '"' + "a" * 2_000_000)
    rows.write_bytes("\ufeff".encode("utf-16-le") + fine.encode("utf-16-le"))
    assert "metadata.jsonl: is UTF-16; save it as UTF-8" in refusal(tmp_path)
    rows.write_text(fine + '{"file_name": "nowhere.png", "text": "b"}\n' * 2)
    source = open_source(tmp_path)
    counts = source.counts
    assert (counts.found, counts.used, counts.reasons()["no such image"]) == (5, 1, 2)
    assert counts.aside == {"without a row in the metadata": 2} and len(source) == 1


def test_names_in_another_normal_form_are_found(tmp_path):
    good(tmp_path / "na\u0308ht.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "n\u00e4ht.png", "text": "a"}', encoding="utf-8")
    assert open_source(tmp_path)[0].captions == ("a",)


def test_an_image_that_is_left_out_later_takes_its_captions_out_of_the_counts(tmp_path):
    for name, text in (("a", "one\ntwo"), ("b", ""), ("c", None), ("d", None), ("e", "three")):
        good(tmp_path / f"{name}.png")
        if text is not None:
            (tmp_path / f"{name}.txt").write_text(text)
    source = open_source(tmp_path)
    assert (source.counts.captions, source.counts.empty, source.counts.missing) == (3, 1, 2)
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(b"")
    assert [sample.id for sample, _ in source.validate()] == ["d.png", "e.png"]
    assert (source.counts.captions, source.counts.empty, source.counts.missing) == (1, 0, 1)
    with pytest.raises(DataError, match=r"1 of 2 images have no caption \(1 missing, 0 empty\): d.png; write"):
        source.require(max_bad=3)
