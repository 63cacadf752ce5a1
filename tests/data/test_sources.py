import json

import numpy as np
import pytest
from PIL import Image

from ldm.data.sources import open_source
from ldm.errors import DataError
from tests.data.captioned import CaptionedFolder


@pytest.fixture
def folder(tmp_path):
    """Three images: a wide one of three stripes, a transparent one, one that EXIF turns by 90 degrees."""
    wide = Image.new("RGB", (192, 64), "red")
    wide.paste((0, 0, 255), (64, 0, 128, 64))
    wide.save(tmp_path / "wide.png")
    Image.new("RGBA", (64, 64), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    turned = Image.new("RGB", (64, 128), "black")
    turned.paste((255, 255, 255), (0, 0, 64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "sub").mkdir()
    turned.save(tmp_path / "sub" / "turned.jpg", exif=exif, quality=100)
    return tmp_path


def write(folder, *rows):
    (folder / "metadata.jsonl").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))


def test_reads_jsonl_upright_cropped_and_on_white(folder):
    rows = [("wide.png", "stripes"), ("clear.png", "näht"), ("sub/turned.jpg", "turned")]
    write(folder, *({"file_name": f, "text": t} for f, t in rows), "")
    data = CaptionedFolder(folder, resolution=32)
    assert len(data) == 3 and [data[i][1] for i in range(3)] == ["stripes", "näht", "turned"]
    stripes, clear, turned = (data[i][0] for i in range(3))
    assert stripes.shape == (32, 32, 3) and stripes.dtype == np.uint8
    assert (stripes[:, 4:-4] == (0, 0, 255)).all()  # the middle third; its edges are filtered with their neighbours
    assert (clear == 255).all()
    assert turned[:, 2:14].mean() < 5 and turned[:, 18:30].mean() > 250  # top became right


def test_reads_csv_with_commas_and_bom(folder):
    rows = ["file_name,caption", 'wide.png,"red, blue"', "clear.png,b", "sub/turned.jpg,c", ""]
    (folder / "metadata.csv").write_text("\r\n".join(rows), encoding="utf-8-sig", newline="")
    assert sorted(caption for _, caption in map(CaptionedFolder(folder).__getitem__, range(3))) == [
        "b",
        "c",
        "red, blue",
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "metadata.jsonl:2: is not JSON"),
        ("[1]", "metadata.jsonl:2: expected an object, got list"),
        ({"text": "a"}, ":2: has no file_name"),
        ({"file_name": 3, "text": "a"}, ":2: file_name is not text (3)"),
        ({"file_name": "clear.png", "label": "a"}, ":2: has no caption (the columns are 'file_name', 'label')"),
        ({"file_name": "clear.png", "text": 5}, ":2: caption is not text (text: 5)"),
        ({"file_name": "clear.png", "text": " "}, "1 of 2 images have no caption (0 missing, 1 empty): clear.png"),
        ({"file_name": "nowhere.png", "text": "a"}, ":2: no such image ('nowhere.png')"),
        ({"file_name": "sub/../../x.png", "text": "a"}, ":2: file_name leads out of the folder"),
        ({"file_name": "/etc/passwd", "text": "a"}, ":2: file_name leads out of the folder"),
        ({"file_name": "link.png", "text": "a"}, ":2: file_name is a link out of the folder"),
    ],
)
def test_names_file_and_line_of_a_bad_row(folder, line, said):
    (folder / "sub" / "turned.jpg").unlink()
    if "link" in str(line):
        (folder / "link.png").symlink_to("/etc/passwd")
    write(folder, {"file_name": "wide.png", "text": "a"}, line)
    with pytest.raises(DataError) as error:
        CaptionedFolder(folder)
    assert said in str(error.value)


def test_refuses_folders_without_captions(folder):
    with pytest.raises(DataError, match="no such folder"):
        CaptionedFolder(folder / "missing")
    with pytest.raises(
        DataError, match=r"has no captions: 3 images, no metadata and no .txt or .caption beside them; write"
    ):
        CaptionedFolder(folder)
    (folder / "metadata.json1").write_text("")
    with pytest.raises(DataError, match=r"metadata.json1 is there: did you mean 'metadata.jsonl'"):
        CaptionedFolder(folder)
    write(folder, "", "")
    with pytest.raises(DataError, match="holds no captions"):
        CaptionedFolder(folder)
    (folder / "metadata.csv").write_text("file_name,text\nwide.png,a,b\n")
    with pytest.raises(DataError, match="both"):
        CaptionedFolder(folder)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(DataError, match=r"metadata.csv:2: expected 2 columns"):
        CaptionedFolder(folder)


def test_names_text_that_is_not_utf8_and_images_that_are_none(folder):
    (folder / "metadata.jsonl").write_bytes(b'\n{"file_name": "wide.png", "text": "caf\xe9"}')
    with pytest.raises(DataError, match=r"metadata.jsonl:2: is not UTF-8"):
        CaptionedFolder(folder)
    for path in (folder / "clear.png", folder / "sub" / "turned.jpg"):
        path.unlink()
    (folder / "fake.png").write_text("<html>")
    whole = (folder / "wide.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    write(folder, *({"file_name": f, "text": "a"} for f in ("fake.png", "cut.png", "wide.png")))
    for index, (name, said) in enumerate({"fake.png": "no image", "cut.png": "damaged or cut short"}.items()):
        with pytest.raises(DataError, match=rf"{name}: is {said}"):
            CaptionedFolder(folder)[index]


def test_a_library_error_without_words_is_told_by_its_kind(tmp_path, monkeypatch):
    import pyarrow.parquet

    def wordless(*args, **words):
        raise OSError

    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", wordless)
    with pytest.raises(DataError, match=r"a.parquet: is not a sound parquet file \(OSError\)"):
        open_source(tmp_path / "a.parquet")
