"""One grammar for captions: brackets, Unicode forms, line ends and suffixes mean the same wherever a caption stands."""

import json
import tarfile
import unicodedata

import numpy as np
import pytest
from PIL import Image

from ldm.data.sources import open_source
from ldm.data.sources.captions import parse_captions
from ldm.errors import DataError
from ldm.prompts import parse, plain_text


def pictures(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8 + i)).save(folder / f"{name}.png")
    return folder


def refusal(data, **options):
    with pytest.raises(DataError) as error:
        open_source(data, **options).require()
    return str(error.value)


@pytest.mark.parametrize(
    "text",
    [r"miku \(vocaloid\), 1girl", r"a \[b\] \\ c", r"\o/ \m/", "na\u0308ht", r"smile :\)", "plain, words", r"end \\"],
)
def test_a_text_means_the_same_as_caption_and_as_prompt(tmp_path, text):
    drawn = "".join(piece.text for piece in parse(text))
    assert plain_text(text) == drawn == unicodedata.normalize("NFC", drawn)
    pictures(tmp_path, ["a"])
    (tmp_path / "a.txt").write_text(text)
    assert open_source(tmp_path)[0].captions == (drawn,)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": text}))
    assert open_source(tmp_path)[0].captions == (drawn,)


def test_brackets_of_a_caption_have_no_weight():
    assert plain_text("a (red:1.3) cat [small]") == "a (red:1.3) cat [small]"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_all_systems_part_captions_in_folders_and_tars(tmp_path, end):
    pictures(tmp_path / "set", ["a"])
    for suffix in (".txt", ".caption"):
        text = tmp_path / "set" / f"a{suffix}"
        text.write_bytes(f"one{end}two\u2028still two{end}".encode())
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            tar.add(tmp_path / "set", "set")
        for data in (tmp_path / "set", tmp_path / "a.tar"):
            assert open_source(data)[0].captions == ("one", "two\u2028still two")
            assert open_source(data, captions="whole")[0].captions == ("one two\u2028still two",)
        text.unlink()


def test_paragraphs_are_counted_and_can_be_one_caption(tmp_path):
    pictures(tmp_path, "abc")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("A zorbel stands.\n\nThere is a tree.\n\nThe mood is calm.")
    (tmp_path / "c.txt").write_text("a zorbel")
    source = open_source(tmp_path)
    (note,) = [note for note in source.counts.notes if "several lines" in note]
    assert note.startswith("2 caption files have several lines: each of their 6 lines is an alternative caption; in 2")
    assert "--captions whole" in note and source.counts.captions == 7
    whole = open_source(tmp_path, captions="whole")
    assert whole[0].captions == ("A zorbel stands. There is a tree. The mood is calm.",)
    assert whole.counts.captions == 3 and not whole.counts.notes


def test_names_of_all_unicode_forms_and_letters_meet(tmp_path):
    names = ["café", "naïve", "öl", "plain", "IMG_0"]
    pictures(tmp_path, [unicodedata.normalize("NFD", name) for name in names])
    for name in names:
        file = unicodedata.normalize("NFC", name).replace("IMG", "img")
        (tmp_path / f"{file}.TXT").write_text(name)
    source = open_source(tmp_path)
    source.require()
    assert {s.captions[0] for s in source} == set(names)
    assert "1 caption files are found although capital letters differ: img_0.TXT" in source.counts.notes


def test_capital_letters_count_where_two_files_differ_by_them(tmp_path):
    pictures(tmp_path, ["a", "A"])
    (tmp_path / "a.txt").write_text("small")
    assert {s.id: s.captions for s in open_source(tmp_path)} == {"A.png": (), "a.png": ("small",)}


def test_a_json_beside_an_image_is_read_or_its_fields_are_named(tmp_path):
    pictures(tmp_path / "good", "ab")
    pictures(tmp_path / "bad", "ab")
    for name in "ab":
        content = {"caption": f"a zorbel {name}", "tags": ["red"]}
        (tmp_path / "good" / f"{name}.json").write_text(json.dumps(content, indent=1))
        (tmp_path / "bad" / f"{name}.json").write_text(json.dumps({"tags": ["red"], "score": 1}))
    source = open_source(tmp_path / "good")
    assert [s.captions for s in source] == [("a zorbel a",), ("a zorbel b",)] and ".json files" in source.layout
    said = refusal(tmp_path / "bad")
    assert "its fields are 'tags', 'score', none of text, caption, prompt" in said and "rename" not in said
    for path in list(tmp_path.glob("*/*.json")):  # whoever renames them is helped, or told
        path.rename(path.with_suffix(".txt"))
    assert [s.captions for s in open_source(tmp_path / "good")] == [("a zorbel a",), ("a zorbel b",)]
    assert "caption is JSON without a caption" in refusal(tmp_path / "bad")


@pytest.mark.parametrize("suffix", [".npz", ".xmp"])
def test_files_that_are_no_text_are_never_called_captions(tmp_path, suffix):
    pictures(tmp_path, "abc")
    for name in "abc":
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".npz":
            np.savez(path, latents=np.zeros((4, 2, 2)))
        else:
            path.write_text("<x:xmpmeta/>")
    said = refusal(tmp_path)
    assert "rename" not in said and f"3 files *{suffix} beside them" in said and "write cat.txt" in said


def test_what_stands_in_a_caption_file_but_is_no_caption():
    assert parse_captions(b"<?xml version='1.0'?><a/>", ".txt").fault == "caption is XML, HTML or RTF, no text"
    assert "git-lfs" in parse_captions(b"version https://git-lfs.github.com/spec/v1\noid x", ".txt").fault
    assert parse_captions(b"{red|blue} cat", ".txt").texts == ("{red|blue} cat",)
    assert parse_captions(b'{"text": ["a", "b"]}', ".txt").texts == ("a", "b")


@pytest.mark.parametrize(
    "table",
    [
        "file_name;text\nsub\\a.PNG;red, blue\n",
        "file_name\ttext\nsub\\a.png\tred, blue\n",
        "sep=;\nfile_name;text\nsub/a.png;red, blue\n",
        'file_name,text\n.\\sub\\a.png,"red, blue"\n',
    ],
)
def test_tables_as_windows_and_excel_write_them(tmp_path, table):
    pictures(tmp_path / "sub", "a")
    (tmp_path / "metadata.csv").write_text(table)
    source = open_source(tmp_path)
    source.require()
    assert source[0].captions == ("red, blue",)


def test_a_row_that_misses_its_image_says_which_one_is_near(tmp_path):
    pictures(tmp_path / "sub", ["cat"])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "Cat.jpg", "text": "a"}')
    assert "no such image ('Cat.jpg', but 'sub/cat.png' is there)" in refusal(tmp_path)


def test_what_lies_beside_the_images_without_a_caption_is_named(tmp_path):
    pictures(tmp_path, "abcd")
    for name, end in (("a", ".txt"), ("b", ".txt"), ("c", ".tags"), ("d", ".npz")):
        (tmp_path / f"{name}{end}").write_bytes(b"a caption" if end != ".npz" else b"PK\3\4\xff\xff")
    said = refusal(tmp_path)
    assert "2 of 4 images have no caption (2 missing, 0 empty): c.png, d.png; beside them 1 have a file *.tags" in said
    assert "1 a file *.npz (" in said


def test_columns_that_could_be_the_captions_too_are_named(tmp_path):
    pictures(tmp_path, "a")
    (tmp_path / "metadata.csv").write_text("file_name,caption,text\na.png,long,short\n")
    source = open_source(tmp_path)
    assert source[0].captions == ("short",)
    assert "captions are read from 'text', not from 'caption'" in source.counts.notes
    (tmp_path / "metadata.csv").write_text("image,text\na.png,short\n")
    assert "has no file_name 1" in refusal(tmp_path) and "the columns are 'image', 'text'" in refusal(tmp_path)
