"""Captions from the names of folders and files: numbers and the authors' names go, what is to be seen stays."""

import subprocess
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.sources import open_source
from ldm.data.sources.names import captions_from_names
from ldm.errors import DataError

OPENCLIPART = Path("/usr/share/openclipart/png")  # Debian's package openclipart-png


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("cats/black_cat_01.png", "black cat, cats"),
        ("black-cat (3).png", "black cat"),
        ("BlackCat copy 2.jpg", "black cat"),
        ("a/b/images/sleeping dog.webp", "sleeping dog"),
        ("animals/big_cats/train/lion12.png", "lion, big cats, animals"),
        ("dogs/IMG_20240102_113355.jpg", "dogs"),
        ("DSC00012.jpg", None),
        ("f3a9c0d2e1.png", None),
        ("night_at_tom_s_house.png", "night at tom's house"),
        ("chodovian_39_s_dog_02.png", "chodovian's dog"),
        ("birds/bird.png", "bird, birds"),
        ("red_cat/red_cat_7.png", "red cat"),
        ("日本/猫_1.png", "猫, 日本"),
        ("10_sks dog/001.png", "sks dog"),
        ("vélo_été.png", "vélo été"),
    ],
)
def test_a_name_says_what_is_to_be_seen(name, caption):
    assert captions_from_names([name]) == [(caption,) if caption else ()]


TITLES = [
    "apple",
    "old house",
    "red fish",
    "tall tree",
    "moon",
    "boat",
    "bear",
    "teapot",
    "coat",
    "kite",
    "lamp",
    "owl",
]


def test_authors_are_found_by_their_habits_and_names_that_were_cut():
    """As in Debian's openclipart-png: title, author, cut at 24 characters, a number."""
    stems = [
        f"{title.replace(' ', '_')}_{author}" for title in TITLES for author in ("nicu_buculei", "architetto_francesco")
    ]
    stems += [f"{title.replace(' ', '_')}_ganson" for title in TITLES]
    names = [f"{i % 6}x/{stem[:20]}_01.png" for i, stem in enumerate(stems)]
    expected = [title for title in TITLES for _ in range(2)] + TITLES
    assert captions_from_names(names) == [(title,) for title in expected]


def test_words_that_are_no_names_stay():
    names = [f"arrows/{side}_arrow_{i:02d}.png" for side in ("left", "right", "up", "down") for i in range(5)]
    names += ["arrows/arrow_big.png", "signs/arrow_sign.png"]
    captions = {caption for (caption,) in captions_from_names(names)}
    assert captions == {*(f"{s} arrow, arrows" for s in ("left", "right", "up", "down"))} | {
        "arrow big, arrows",
        "arrow sign, signs",
    }


def test_names_are_asked_for_and_nothing_else_is_read_then(tmp_path):
    for name in ("red_cat_1", "blue_dog_2", "0003"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    with pytest.raises(DataError, match="take the names with --captions names"):
        open_source(tmp_path).require()
    (tmp_path / "red_cat_1.txt").write_text("from a file")
    source = open_source(tmp_path, captions="names")
    assert [s.captions for s in source] == [(), ("blue dog",), ("red cat",)]
    assert "1 files with captions are ignored: captions come from names, as requested" in source.counts.notes
    with pytest.raises(DataError, match=r"1 of 3 images have no caption \(1 missing, 0 empty\): 0003.png"):
        source.require()
    for path in tmp_path.glob("*_*"):
        path.unlink()
    with pytest.raises(DataError, match="no name of a file or folder holds words"):
        open_source(tmp_path, captions="names").require(allow_empty_captions=True)


@pytest.mark.slow
@pytest.mark.skipif(not OPENCLIPART.is_dir(), reason="apt install openclipart-png")
def test_eight_thousand_drawings_by_many_hands():
    owned = subprocess.run(["find", OPENCLIPART, "-name", "*.png"], capture_output=True, text=True).stdout.split("\n")
    source = open_source(OPENCLIPART, captions="names")
    assert source.counts.found == len(owned) - 1 > 8000 and source.counts.captions == source.counts.used
    captions = {sample.id: sample.captions[0] for sample in source}
    assert captions["animals/mammals/dolphin_01.png"] == "dolphin, mammals, animals"
    assert captions["food/grapes_leif_lodahl_02.png"] == "grapes, food"
    assert captions["animals/birds/cigno_architetto_frances_01.png"] == "cigno, birds, animals"
    authors = ("architetto", "nicu", "buculei", "ganson", "juliane", "mateya", "jarno", "peterm", "benji", "gerhards")
    left = [c for c in captions.values() if any(author in c.split() for author in authors)]
    assert len(left) < 10 and len(set(captions.values())) > 5000
    assert sum(1 for _ in source.validate()) == source.counts.used
    assert set(source.counts.reasons()) == {"is too large an image"} and len(source.counts.skipped) == 16
    source.require()
