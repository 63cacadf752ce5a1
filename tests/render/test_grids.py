"""Grids: axes from text, every combination in its order under one seed, and a sheet with each picture in its place."""

import itertools
import re
from dataclasses import replace

import pytest
from PIL import Image, ImageFont
from prompt_files import jobs_of, resolve

from ldm.errors import ConfigError
from ldm.images import encode
from ldm.pipeline.result import Target
from ldm.render.jobs.jobs import Shard, short
from ldm.render.jobs.scan import Run, scan
from ldm.render.output.folder import finished
from ldm.render.output.manifest import Manifest
from ldm.render.prompts.entry import Prompts
from ldm.render.prompts.files import read_entries
from ldm.render.sheets import grid_sheet
from ldm.render.sheets.axes import grid_entries, gridded, read_axes
from ldm.render.sheets.grid_sheet import draw_sheet, write_sheets
from ldm.render.sheets.labels import cut, wrapped


def entry_of(line="a cat on a red mat"):
    (entry,) = read_entries([line])
    return entry


def cells_of(*items, line="a cat on a red mat"):
    return [dict(cell.settings) for cell in grid_entries(entry_of(line), read_axes(items))]


@pytest.mark.parametrize(
    ("item", "name", "values"),
    [
        ("steps=4,8, 16", "num_inference_steps", [4, 8, 16]),
        ("steps=4-16:4", "num_inference_steps", [4, 8, 12, 16]),
        ("steps=4-7", "num_inference_steps", [4, 5, 6, 7]),
        ("steps=1,4-6,20", "num_inference_steps", [1, 4, 5, 6, 20]),
        ("cfg=2-8:1.5", "guidance_scale", [2, 3.5, 5, 6.5, 8]),
        ("eta=0-1:0.1", "eta", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        ("CFG scale=1,2.5", "guidance_scale", [1, 2.5]),
        ("sampler=euler,DPM++ 2M", "sampler", ["euler", "dpmpp_2m"]),
        ("seed=7-9,1", "seed", [7, 8, 9, 1]),
        ('negative_prompt="a, b",c', "negative_prompt", ["a, b", "c"]),
        ('prompt="a cat, big","say ""hi"""', "prompt", ["a cat, big", 'say "hi"']),
        ("prompt=cat->dog,bird", "prompt", [f"a {w} on a red mat" for w in ("cat", "dog", "bird")]),
        ("prompt=cat->", "prompt", ["a cat on a red mat", "a  on a red mat"]),
        ('prompt="a cat"->"one, two","x"', "prompt", [f"{w} on a red mat" for w in ("a cat", "one, two", "x")]),
    ],
)
def test_one_axis(item, name, values):
    assert [cell[name] for cell in cells_of(item)] == values


def test_every_combination_the_first_axis_fastest_under_one_seed():
    cells = cells_of("steps=4,8", "sampler=euler,DPM++ 2M Karras", "prompt=cat->dog")
    order = itertools.product(["a cat on a red mat", "a dog on a red mat"], ["euler", "dpmpp_2m"], [4, 8])
    assert [(cell["prompt"], cell["sampler"], cell["num_inference_steps"]) for cell in cells] == list(order)
    assert [cell.get("spacing") for cell in cells[:4]] == [None, None, "karras", "karras"]
    assert len({cell["seed"] for cell in cells}) == 1
    assert len({job.key for job in jobs_of(cells)}) == 8


def test_the_seed_is_the_lines_or_comes_from_the_run_and_the_line():
    assert {cell["seed"] for cell in cells_of("steps=1,2", line="a cat --d 5")} == {5}
    entries = [grid_entries(entry_of(line), read_axes(["steps=1,2"]), run)[0] for line in ("a", "b") for run in (0, 1)]
    assert len({entry.settings["seed"] for entry in entries}) == 4
    assert entries[0].settings == grid_entries(entry_of("a"), read_axes(["steps=1,2"]))[0].settings


def test_two_axes_may_replace_words_of_one_prompt():
    prompts = [cell["prompt"] for cell in cells_of("prompt=cat->dog", "prompt=red->blue")]
    assert prompts == [f"a {a} on a {b} mat" for b in ("red", "blue") for a in ("cat", "dog")]


def test_an_axis_wins_over_the_line_and_automatic_takes_the_lines_spacing_away():
    cells = cells_of("spacing=Automatic,beta", line='a cat --ss "DPM++ 2M Karras" --s 9')
    assert [(cell.get("spacing"), cell["sampler"], cell["num_inference_steps"]) for cell in cells] == [
        (None, "dpmpp_2m", 9),
        ("beta", "dpmpp_2m", 9),
    ]


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (["steps"], "expected WORD=VALUE"),
        (["steps="], "expected WORD=VALUE"),
        (["stpes=4"], "did you mean 'steps'"),
        (["steps=4,x"], "steps: expected a whole number"),
        (["steps=4,4"], "steps: '4' is there twice"),
        (["steps=4-6,5"], "'5' is there twice"),
        (["cfg=1-2.5"], "1-2.5 needs a step"),
        (["steps=9-4"], "9-4 is no range"),
        (["steps=4-9:0"], "4-9:0 is no range"),
        (["seed=1-999999999"], "are 999,999,999 values"),
        (["sampler=eular"], "did you mean 'euler'"),
        (["n_iter=1,2"], "changes no image"),
        (["steps=1", "cfg=1", "seed=1", "eta=1"], "4 axes are more than 3"),
        (["steps=1,2", "num_inference_steps=3"], "change the same setting"),
        (["sampler=DPM++ 2M Karras", "spacing=beta"], "change the same setting"),
        (["prompt=a", "prompt=b"], "change the same setting"),
        (["seed=1-50", "steps=1-50"], "50 x 50 are 2,500 images a prompt, more than 1,000"),
        (["prompt=->dog"], "nothing to search for"),
        (['prompt="a'], "cannot be split"),
        (["lora=nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_bad_axes_are_refused(items, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_axes(items)


@pytest.mark.parametrize(
    ("line", "item", "said"),
    [
        ("a dog", "prompt=cat->bird", "'cat' is not in the prompt"),
        ("a cat --d 1,2", "steps=1,2", "a cell of a grid holds one image"),
        ({"prompt": "a", "num_images": 2}, "steps=1,2", "a cell of a grid holds one image"),
        ("a cat --steps x", "cfg=1,2", "expected a whole number"),
    ],
)
def test_lines_that_do_not_fit_a_grid_are_entries_with_an_error(line, item, said):
    (entry,) = grid_entries(entry_of(line), read_axes([item]))
    assert said in str(entry.error) and entry.where == "prompts, entry 1"


# The sheet


def colour(i):
    return (40 + 7 * i, 200 - 5 * i, 90)


def places(sheet, colours, size):
    """Where the left upper corner of each one-coloured picture is; fails where one is not there whole."""
    pixels, found = sheet.load(), []
    for wanted in colours:
        corner = next((x, y) for y in range(sheet.height) for x in range(sheet.width) if pixels[x, y] == wanted)
        box = sheet.crop((*corner, corner[0] + size[0], corner[1] + size[1]))
        assert box.getcolors() == [(size[0] * size[1], wanted)]
        found.append(corner)
    return found


def test_each_picture_stands_in_its_column_row_and_block():
    axes = read_axes(["steps=1,2,3", "sampler=euler,heun", "seed=1,2"])
    pictures = [Image.new("RGB", (40, 24), colour(i)) for i in range(12)]
    sheet = draw_sheet(axes, pictures, title="a cat")
    found = places(sheet, [colour(i) for i in range(12)], (40, 24))
    for block in (found[:6], found[6:]):
        assert len({x for x, _ in block}) == 3 and len({y for _, y in block}) == 2
        assert [x for x, _ in block[:3]] == sorted({x for x, _ in block}) and block[0][1] < block[3][1]
    assert set(found[:6]).isdisjoint(found[6:])
    assert min(x for x, _ in found) > 20 and min(y for _, y in found) > 20  # room for labels
    left = sheet.crop((0, found[0][1] - 20, found[0][0] - 14, found[0][1] + 20))
    above = sheet.crop((found[0][0], 0, found[0][0] + 40, found[0][1] - 2))
    assert all(part.convert("L").getextrema()[0] < 160 for part in (left, above))  # and there are some


def test_smaller_pictures_are_centred_and_missing_ones_grey(tmp_path):
    Image.new("RGB", (20, 24), colour(1)).save(tmp_path / "b.png")
    (tmp_path / "broken.png").write_text("no picture")
    pictures = [Image.new("RGB", (64, 64), colour(0)), tmp_path / "b.png", None, tmp_path / "broken.png"]
    sheet = draw_sheet(read_axes(["steps=1,2,3,4"]), pictures)
    (first,), (second,) = places(sheet, [colour(0)], (64, 64)), places(sheet, [colour(1)], (20, 24))
    assert second[0] == first[0] + 68 + 22 and second[1] == first[1] + 20
    assert sheet.getpixel((first[0] + 2 * 68 + 5, first[1] + 60)) == sheet.getpixel(
        (first[0] + 3 * 68 + 5, first[1] + 60)
    )
    assert sheet.getpixel((first[0] + 2 * 68 + 5, first[1] + 60)) == (225, 225, 225)


def test_a_sheet_has_the_pages_words():
    axes = read_axes(["cfg=4,6", "num_inference_steps=8,9", "sampler=euler,ddim"])
    assert [axis.label(0) for axis in axes] == ["guidance 4", "steps 8", "sampler euler"]


def test_each_prompt_gets_its_sheet_with_its_own_pictures(tmp_path):
    entries = list(read_entries(["a cat --d 1", "a dog --s x", "a cat --d 1", "a bird"]))
    axes = read_axes(["steps=1,2,3", "cfg=1,2"])
    prompts = gridded(Prompts("prompts", iter(entries)), axes, 0)
    rest = {"target": Target.of(tmp_path), "resolver": resolve, "shard": Shard(), "metadata": True}
    run = Run(prompts, **rest, defaults={}, wildcards=None, seed=0, batch_size=None)
    with Manifest(tmp_path) as ledger, ledger.job_file() as job_file:
        assert scan(run, ledger.finished, lambda entry: None, job_file).bad == 1
        jobs, sheets = list(job_file.jobs()), list(job_file.sheets())
        ledger.save(replace(jobs[0], key="0" * 32, stem="of-an-older-run"), encode(Image.new("RGB", (64, 64), "white")))
        for job in jobs:
            if job.index != 9:
                ledger.save(job, encode(Image.new("RGB", (64, 64), colour(job.index))))
    paths = write_sheets(tmp_path, sheets, axes, {short(line["key"]): line["path"] for line in finished(tmp_path)})
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [f"grids/00{i}.png" for i in (1, 2, 3)]
    for path, own in zip(paths, (range(1, 7), (7, 8, 10, 11, 12), range(13, 19))):
        with Image.open(path) as sheet:
            places(sheet, [colour(i) for i in own], (64, 64))


def test_a_sheet_of_many_large_pictures_is_made_smaller(monkeypatch):
    monkeypatch.setattr(grid_sheet, "MAX_AREA", 500_000)
    sheet = draw_sheet(read_axes(["steps=1-10", "cfg=1-5"]), [Image.new("RGB", (512, 512), colour(3))] * 50)
    assert 300_000 < sheet.width * sheet.height < 700_000
    monkeypatch.setattr(grid_sheet, "MAX_SIDE", 600)
    assert draw_sheet(read_axes(["steps=1-10"]), [Image.new("RGB", (512, 512), colour(3))] * 10).width < 700


@pytest.mark.parametrize(
    "text", ["", "one", "some words that need more lines than there are", "x" * 500, "a " + "y" * 90, "é" * 5000]
)
@pytest.mark.parametrize("lines", [1, 2, 3])
def test_texts_fit_their_place(text, lines):
    font = ImageFont.load_default(12)
    told = wrapped(text, font, 80, lines)
    assert len(told) <= lines and all(font.getlength(line) <= 80 for line in told)
    whole = " ".join(told) == " ".join(text.split())
    assert whole or told[-1].endswith("…")
    assert font.getlength(cut(text, font, 50)) <= 50
