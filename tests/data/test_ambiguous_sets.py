"""Sets that can be read in several ways: nothing is set aside in silence, and the advice of a refusal works."""

import io
import json
import os
import re
import shlex
import subprocess
import tarfile

import pytest
from PIL import Image

from ldm.cli import main
from ldm.data.sources import open_source
from ldm.data.sources.lost import hint_for
from ldm.errors import DataError
from tests.data.captioned import CaptionedFolder


def picture(path, number=0, caption=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (number * 37 % 256, number * 91 % 256, 90)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def captioned(folder, count, start=0):
    for i in range(start, start + count):
        picture(folder / f"{i:02d}.png", i, f"thing {i}")
    return folder


def sound(data, **options):
    source = open_source(data, **options)
    source.require()
    return source


def refused(data, **options):
    with pytest.raises(DataError) as error:
        sound(data, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def ways(said):
    """{layout or split: images} that a refusal offers."""
    return {
        (kind, name): int(n) for kind, name, n in re.findall(r"--(layout|split) (\w+) (?:uses )?(?:all )?(\d+)", said)
    }


def follow(said, data, total):
    """Every way that a refusal offers uses as many images as it says, and is not refused."""
    offered = ways(said)
    assert len(offered) >= 2 and any(count >= 0.8 * total for count in offered.values()), said
    for (kind, name), count in offered.items():
        source = open_source(data, **{kind: name})
        source.require(allow_empty_captions=True)
        assert len(source) == count, (kind, name)


# kohya's folders


def test_repeats_stay_where_an_image_lies_outside(tmp_path):
    captioned(tmp_path / "10_cat", 10)
    captioned(tmp_path / "2_dog", 10, 10)
    before = sound(tmp_path)
    assert sum(s.repeats for s in before) == 120
    picture(tmp_path / "sample" / "lora_000100.png", 50)
    source = sound(tmp_path)
    assert [(s.id, s.repeats) for s in source] == [(s.id, s.repeats) for s in before]
    assert source.counts.aside == {"outside of kohya's folders": 1} and not source.counts.chosen


def test_more_than_a_few_images_outside_are_refused_by_name_and_excluding_them_helps(tmp_path):
    captioned(tmp_path / "10_cat", 8)
    picture(tmp_path / "sample" / "lora_000100.png", 50)
    said = refused(tmp_path)
    assert "1 of 9 cannot be used" in said and "sample/lora_000100.png" in said
    assert sum(s.repeats for s in sound(tmp_path, exclude=[re.search(r"--exclude '(.*?)'", said)[1]])) == 80
    picture(tmp_path / "sample" / "lora_000200.png", 51)
    assert (pattern := re.search(r"--exclude '(.*?)'", refused(tmp_path))[1]) == "sample/*"
    assert sum(s.repeats for s in sound(tmp_path, exclude=[pattern])) == 80
    assert {s.repeats for s in sound(tmp_path, layout="files", exclude=["sample"])} == {1}


def test_a_folder_that_is_switched_off_is_left_out(tmp_path):
    captioned(tmp_path / "10_cat", 4)
    captioned(tmp_path / "0_dog", 8, 10)
    source = sound(tmp_path)
    assert len(source) == 4 and sum(s.repeats for s in source) == 40
    assert source.counts.aside == {"switched off by the name of its folder, 0_dog": 8}


def test_half_of_a_set_in_kohya_s_folders_is_a_question_and_little_of_it_a_note(tmp_path):
    captioned(tmp_path / "10_cat", 6)
    captioned(tmp_path / "more", 4, 10)
    said = refused(tmp_path)
    assert "6 of 10 images are in folders such as kohya's (10_cat 6)" in said
    follow(said, tmp_path, 10)
    captioned(tmp_path / "more", 20, 20)
    source = sound(tmp_path)
    assert len(source) == 30 and any("6 images in folders such as kohya's" in note for note in source.counts.notes)


def test_years_are_no_repeats(tmp_path):
    captioned(tmp_path / "2019_summer", 3)
    captioned(tmp_path / "2020_winter", 3, 10)
    said = refused(tmp_path)
    assert "2019_summer is a folder: is its number one of repeats?" in said
    follow(said, tmp_path, 6)
    assert {s.repeats for s in sound(tmp_path, layout="files")} == {1}


def test_a_project_of_kohya_ss_keeps_its_regularization_apart(tmp_path):
    tmp_path = tmp_path / "my project"
    captioned(tmp_path / "img" / "10_cat", 4)
    (tmp_path / "log").mkdir()
    assert sum(s.repeats for s in sound(tmp_path)) == 40
    captioned(tmp_path / "reg" / "1_animal", 20, 10)
    said = refused(tmp_path)
    assert "4 images in img, and 20 of regularization in reg" in said
    ((data, *_), (prior, *_)) = map(shlex.split, re.search(r"give (.+), and --prior (.+) for", said).groups())
    assert sum(s.repeats for s in sound(data)) == 40 and len(sound(prior)) == 20


# splits


def test_a_subject_called_train_is_no_split(tmp_path):
    for k, kind in enumerate(("bus", "car", "plane", "train")):
        captioned(tmp_path / kind, 5, 10 * k)
    source = sound(tmp_path)
    assert len(source) == 20 and not source.counts.aside
    assert any("only 5 of 20 images are in it" in note for note in source.counts.notes)
    assert len(sound(tmp_path, split="train")) == 5


def test_splits_are_read_where_train_is_nearly_all(tmp_path):
    captioned(tmp_path / "train", 39)
    captioned(tmp_path / "test", 1, 50)
    source = sound(tmp_path)
    assert len(source) == 39 and source.counts.aside == {"in the split test": 1} and not source.counts.chosen
    picture(tmp_path / "cover.png", 60, "a cover")  # one image more, in no split
    assert len(sound(tmp_path)) == 39
    picture(tmp_path / "poster.png", 61, "a poster")  # together more than may be lost
    said = refused(tmp_path)
    assert "in no split 2" in said
    captioned(tmp_path / "more", 10, 70)
    follow(refused(tmp_path), tmp_path, 52)


def test_a_tenth_in_another_split_is_a_question(tmp_path):
    """Whatever is set aside counts, unless --split asked for it."""
    captioned(tmp_path / "train", 18)
    captioned(tmp_path / "test", 2, 20)
    said = refused(tmp_path)
    assert "train 18, test 2 of 20 images; choose: --split train uses 18" in said
    follow(said, tmp_path, 20)
    assert sound(tmp_path, split="train").counts.chosen == {"in the split test"}
    assert hint_for(open_source(tmp_path).counts, "in the split test").endswith("read everything by --split all")


def test_splits_of_which_none_is_nearly_all_are_a_question(tmp_path):
    captioned(tmp_path / "train", 12)
    captioned(tmp_path / "test", 8, 20)
    said = refused(tmp_path)
    assert "train 12, test 8 of 20 images" in said
    follow(said, tmp_path, 20)
    assert len(sound(tmp_path, split="all")) == 20


def test_splits_of_a_saved_set_too(tmp_path):
    import datasets

    def part(count, start=0):
        rows = {"image": [picture(tmp_path / "i.png", start + i).read_bytes() for i in range(count)]}
        return datasets.Dataset.from_dict({**rows, "text": [f"thing {start + i}" for i in range(count)]})

    datasets.DatasetDict({"train": part(6), "test": part(6, 10)}).save_to_disk(str(tmp_path / "half"))
    said = refused(tmp_path / "half")
    assert "train 6, test 6 of 12 images" in said
    follow(said, tmp_path / "half", 12)
    datasets.DatasetDict({"train": part(19), "test": part(1, 20)}).save_to_disk(str(tmp_path / "most"))
    assert len(sound(tmp_path / "most")) == 19 and "split train of train, test" in sound(tmp_path / "most").layout


# metadata, tars and parquet files beside images


def rows(folder, names):
    text = "".join(json.dumps({"file_name": name, "text": f"row of {name}"}) + "\n" for name in names)
    (folder / "metadata.jsonl").write_text(text)


def test_metadata_of_few_images_is_a_question(tmp_path):
    captioned(tmp_path, 20)
    rows(tmp_path, [f"{i:02d}.png" for i in range(5)])
    said = refused(tmp_path)
    assert "metadata.jsonl has rows for 5 of 20 images" in said and "20 of them with a caption file" in said
    follow(said.replace("uses these", "uses"), tmp_path, 20)
    rows(tmp_path, [f"{i:02d}.png" for i in range(18)])
    said = refused(tmp_path)
    assert "2 of 20 cannot be used, 5 % are allowed: without a row in the metadata 2; the first: 18.png" in said
    assert len(sound(tmp_path, exclude=["18.png", "19.png"])) == 18
    open_source(tmp_path).require(max_bad=2)


def test_rows_of_images_that_are_left_out_are_passed_over(tmp_path):
    captioned(tmp_path / "good", 8)
    captioned(tmp_path / "bad", 4, 10)
    rows(tmp_path, [*(f"good/{i:02d}.png" for i in range(8)), *(f"bad/{i}.png" for i in range(10, 14))])
    for pattern in ("bad/*", "bad", "bad/1?.png"):
        source = sound(tmp_path, exclude=[pattern])
        assert len(source) == source.counts.found == 8


def tar(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for i, name in enumerate(names):
            buffer = io.BytesIO()
            if name.endswith(".png"):
                Image.new("RGB", (8, 8 + i)).save(buffer, "PNG")
            else:
                buffer.write(b"a thing")
            info = tarfile.TarInfo(name)
            info.size = buffer.tell()
            file.addfile(info, io.BytesIO(buffer.getvalue()))
    return path


def test_a_preview_beside_tars_does_not_hide_them(tmp_path):
    tar(tmp_path / "00000.tar", [f"{i}.{end}" for i in range(10) for end in ("png", "txt")])
    picture(tmp_path / "preview.png")
    source = sound(tmp_path)
    assert len(source) == 10 and "images that are not read: 1 in files" in source.counts.notes
    captioned(tmp_path, 6)
    said = refused(tmp_path)
    assert "holds 10 images in .tar files, and 7 in files" in said
    follow(said, tmp_path, 10)


def test_shards_in_no_split_are_read_too(tmp_path):
    for name in ("train", "extra", "other"):
        tar(tmp_path / f"{name}.tar", [f"{name}{i}.{end}" for i in range(4) for end in ("png", "txt")])
    assert len(sound(tmp_path)) == 12
    assert len(sound(tmp_path, split="train")) == 4


def table(path, **columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), path)
    return path


def test_of_several_columns_of_images_the_usual_name_is_read_and_the_others_are_told(tmp_path):
    import datasets

    small, large = ([{"bytes": picture(tmp_path / f"{i}.png", i).read_bytes()}] * 3 for i in (1, 2))
    columns = {"conditioning_image": small, "image": large, "text": ["a thing"] * 3}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "saved"))
    table(tmp_path / "set.parquet", **columns)
    for data in (tmp_path / "set.parquet", tmp_path / "saved"):
        source = sound(data)
        assert source[0].open().read() == large[0]["bytes"]
        assert "images are read from 'image', not from 'conditioning_image'" in source.counts.notes


# tars


@pytest.mark.parametrize("order", ["images first", "captions first", "as it comes"])
def test_the_files_of_a_key_may_lie_anywhere_in_a_tar(tmp_path, order):
    images, texts = [f"set/{i:04}.png" for i in range(6)], [f"set/{i:04}.txt" for i in range(6)]
    mixed = [name for pair in zip(images[::-1], texts) for name in pair]
    names = {"images first": images + texts, "captions first": texts + images, "as it comes": mixed}[order]
    source = sound(tar(tmp_path / "a.tar", names))
    assert len(source) == 6 and all(s.captions == ("a thing",) for s in source)
    assert sorted(s.image().height for s in source) == sorted(8 + names.index(name) for name in images)


def test_names_with_several_dots_are_samples_of_their_own(tmp_path):
    names = [f"v1.{i}.{end}" for i in range(5) for end in ("png", "txt")]
    assert len(sound(tar(tmp_path / "a.tar", names))) == 5
    said = refused(tar(tmp_path / "b.tar", ["1.png", "1.mask.png", "1.txt"]))
    assert "beside another image of its key 1; the first: " in said and "1.mask.png" in said
    assert len(sound(tmp_path / "b.tar", exclude=["*.mask.png"])) == 1
    assert len(sound(tmp_path / "b.tar", exclude=[re.search(r"--exclude '(.*?)'", said)[1]])) == 1


def test_a_tar_says_what_is_in_the_place_of_captions(tmp_path):
    said = refused(tar(tmp_path / "a.tar", ["1.png", "2.png", "x.txt", "y.txt", "z.txt"]))
    assert "(2 images, 3 caption files have other keys: x.txt, y.txt, z.txt)" in said
    said = refused(tar(tmp_path / "b.tar", ["10_cat/1.png", "10_cat/1.txt", "2_dog/1.png", "2_dog/1.txt"]))
    assert "kohya's folders (10_cat, …), whose repeats are not read from a tar" in said
    with tarfile.open(tmp_path / "b.tar") as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    assert [s.repeats for s in sound(tmp_path / "unpacked")] == [10, 2]
    assert len(sound(tmp_path / "b.tar", layout="tars")) == 2


# links and files that are not read


def snapshot(folder):
    """What `hf download` leaves: a folder of links into the repository's blobs."""
    repository = folder / "datasets--me--set"
    at, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    at.mkdir(parents=True)
    blobs.mkdir()
    for i in range(4):
        picture(blobs / f"hash{i}.png", i).rename(blobs / f"hash{i}")
        (at / f"{i}.png").symlink_to(f"../../blobs/hash{i}")
    rows(blobs, [f"{i}.png" for i in range(4)])
    (at / "metadata.jsonl").symlink_to("../../blobs/metadata.jsonl")
    return at


def test_a_snapshot_of_the_hub_is_followed_into_its_blobs(tmp_path):
    at = snapshot(tmp_path)
    source = sound(at)
    assert [s.captions for s in source] == [(f"row of {i}.png",) for i in range(4)] and source[2].image().size == (
        16,
        16,
    )
    (at / "4.png").symlink_to(picture(tmp_path / "elsewhere.png"))
    assert open_source(at).counts.aside == {"without a row in the metadata": 1}


def test_links_out_of_the_folder_are_counted_with_their_place_and_copying_them_helps(tmp_path):
    farm, store = tmp_path / "my farm", tmp_path / "store"
    farm.mkdir()
    for i in range(8):
        (farm / f"{i}.png").symlink_to(picture(store / f"{i}.png", i))
        (farm / f"{i}.txt").write_text("thing")
    said = refused(farm)
    assert "8 of 8 cannot be used" in said and f"is a link out of the folder (into {store})" in said
    command = re.search(r"\((cp -rL .*?)\)", said)[1]
    copy = tmp_path / "copy"
    subprocess.run(shlex.split(command.replace("FOLDER", f"'{farm}'").replace("COPY", str(copy))), check=True)
    assert len(sound(copy)) == 8


def test_images_behind_a_link_to_a_folder_count_as_lost(tmp_path):
    captioned(tmp_path / "set" / "cats", 4)
    captioned(tmp_path / "far" / "dogs", 16)
    (tmp_path / "set" / "dogs").symlink_to(tmp_path / "far" / "dogs")
    assert "16 of 20 cannot be used" in refused(tmp_path / "set")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_the_advice_for_captions_in_another_encoding_works(tmp_path, encoding):
    captioned(tmp_path, 4)
    for path in tmp_path.glob("*.txt"):
        path.write_bytes("ein Bär".encode(encoding))
    command = re.search(r"(iconv -f \S+ -t UTF-8) does", refused(tmp_path))[1]
    for path in tmp_path.glob("*.txt"):
        path.write_bytes(subprocess.run([*command.split(), path], capture_output=True, check=True).stdout)
    assert {s.captions for s in sound(tmp_path)} == {("ein Bär",)}


def test_cameras_own_files_are_called_what_they_are(tmp_path):
    captioned(tmp_path, 4)
    for i, suffix in enumerate((".arw", ".cr3", ".RAF")):
        (tmp_path / f"{i}{suffix}").write_bytes(b"II*\0" + bytes(100))
    said = refused(tmp_path)
    assert "is of a kind that is not read 3" in said and "rename" not in said
    assert len(sound(tmp_path, exclude=["*.arw", "*.cr3", "*.RAF"])) == 4


def test_a_mask_by_its_name_that_has_a_caption_or_a_row_is_an_image(tmp_path):
    captioned(tmp_path, 4)
    picture(tmp_path / "gas.png", 5, "gas")
    picture(tmp_path / "gas-mask.png", 6)
    source = sound(tmp_path)
    assert len(source) == 5 and any("1 masks" in note for note in source.counts.notes)
    (tmp_path / "gas-mask.txt").write_text("a gas mask")
    assert len(sound(tmp_path)) == 6
    (tmp_path / "gas-mask.txt").unlink()
    rows(tmp_path, ["gas.png", "gas-mask.png", *(f"{i:02d}.png" for i in range(4))])
    source = sound(tmp_path)
    assert len(source) == 6 and not source.masks and source.counts.found == 6


def test_images_whose_names_do_not_say_so_count_as_lost(tmp_path):
    captioned(tmp_path, 4)
    for i in range(10, 14):
        picture(tmp_path / f"{i}.png", i).rename(tmp_path / f"{i}.{'jpg_large' if i % 2 else 'part'}")
    said = refused(tmp_path)
    assert "is an image with a suffix of something else 4" in said and "rename them" in said
    for path in [*tmp_path.glob("*.jpg_large"), *tmp_path.glob("*.part")]:
        path.rename(path.with_suffix(".png")).with_suffix(".txt").write_text("found")
    assert len(sound(tmp_path)) == 8


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "readme.txt").write_text("words")
    assert "holds no images (1 .zip, 1 .txt); unpack it, and give the folder" in refused(tmp_path)


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_an_unreadable_folder_of_the_system_is_passed_over(tmp_path):
    captioned(tmp_path, 3)
    (tmp_path / "lost+found").mkdir(mode=0)
    assert len(sound(tmp_path)) == 3


def test_a_folder_of_the_system_that_cannot_be_listed_is_passed_over(tmp_path, monkeypatch):
    captioned(tmp_path, 3)
    for name in ("lost+found", "locked"):
        (tmp_path / name).mkdir()
    scandir = os.scandir

    def denied(path):
        if os.path.basename(path) in ("lost+found", "locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    said = refused(tmp_path)
    assert "locked: cannot be listed (Permission denied)" in said
    pattern = re.search(r"--exclude '(.*)'", said)[1]
    assert len(sound(tmp_path, exclude=[pattern])) == 3


def test_patterns_that_match_nothing_are_refused(tmp_path):
    captioned(tmp_path, 3)
    assert "--exclude 'smaple/*' matches no file" in refused(tmp_path, exclude=["smaple/*"])
    assert "has rows" in refused_hub(tmp_path)


def refused_hub(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [b"x"], "text": ["a"]}), tmp_path / "a.parquet")
    return refused(tmp_path / "a.parquet", exclude=["a"])


# the commands


def test_the_doctor_ends_with_three_and_the_trainers_with_two(tmp_path, capsys):
    data = captioned(tmp_path / "set", 20)
    for path in data.glob("*.png"):
        Image.effect_noise((160, 140), 90).resize((8, 7)).resize((160, 140)).save(path)
    rows(data, [f"{i:02d}.png" for i in range(5)])
    asked = ["data", "check", str(data), "--no-estimate", "--resolution", "128"]
    assert main(asked) == 3
    assert "training refuses this set: metadata.jsonl has rows for 5 of 20 images" in capsys.readouterr().out
    assert main([*asked, "--layout", "files"]) == 0
    assert main(["finetune", str(data), "-o", str(tmp_path / "r"), "--dry-run", "--prior-images", "0"]) == 2
    assert "--layout files all 20" in capsys.readouterr().err
    with pytest.raises(DataError, match="--layout files"):
        CaptionedFolder(data)
    assert len(CaptionedFolder(data, layout="files")) == 20
