"""Pictures that save and show themselves, and the record that each one carries."""

import json

import pytest
from PIL import Image

from ldm import images as pictures
from ldm.errors import ConfigError
from ldm.pipeline import Images, Pipeline
from ldm.pipeline.metadata import parameters

FAST = {"num_inference_steps": 2, "sampler": "euler", "guidance_scale": 6.5}
RECORD = {
    "prompt": "a cat",
    "negative_prompt": "",
    "seed": 7,
    "num_inference_steps": 25,
    "guidance_scale": 6.0,
    "height": 128,
    "width": 96,
    "sampler": "dpmpp_2m",
    "spacing": "trailing",
    "model": "default",
    "model_hash": "0123456789abcdef",
    "versions": {"ldm": "0.1.0"},
}


def made(prompts):
    """Images of plain colours."""
    return Images(
        [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(len(prompts))],
        [{**RECORD, "prompt": prompt, "seed": 7 + i} for i, prompt in enumerate(prompts)],
    )


def test_parameters_are_written_as_a1111_writes_them():
    line = "Steps: 25, Sampler: DPM++ 2M, Schedule type: Simple, CFG scale: 6.0, Seed: 7, Size: 96x128"
    tail = "Model hash: 0123456789, Model: default, RNG: CPU, Version: ldm 0.1.0"
    assert parameters(RECORD) == f"a cat\n{line}, {tail}"
    karras = parameters({**RECORD, "sampler": "dpmpp_2m_sde", "spacing": "karras"})
    assert "Sampler: DPM++ 2M SDE, Schedule type: Karras," in karras
    assert parameters({**RECORD, "negative_prompt": "a dog"}) == f"a cat\nNegative prompt: a dog\n{line}, {tail}"
    assert parameters({**RECORD, "clip_skip": 0}) == parameters(RECORD)
    skipping = parameters({**RECORD, "clip_skip": 1, "strength": 0.5})
    assert "Model: default, Denoising strength: 0.5, Clip skip: 2, RNG: CPU," in skipping
    odd = parameters({**RECORD, "model": 'a, "b": c', "sampler": "heun_flow", "spacing": "other", "model_hash": ""})
    assert odd.splitlines()[1].startswith("Steps: 25, Sampler: Heun flow, CFG scale: 6.0, Seed: 7")
    assert 'Model: "a, \\"b\\": c", RNG: CPU' in odd and "Model hash" not in odd


def test_a_picture_carries_what_draws_it_again(tiny_folder, tmp_path):
    pipe = Pipeline("a cät, 🐱", model=tiny_folder, negative_prompt="red")
    images = pipe.generate(seed=11, num_images=2, width=24, **FAST)
    path = images.save(tmp_path)[1]
    found = pictures.read_metadata(path)
    record = found.ldm
    assert record == json.loads(json.dumps(images.metadata[1]))
    assert found.parameters == parameters(images.metadata[1])
    assert found.parameters.startswith("a cät, 🐱\nNegative prompt: red\nSteps: 2, Sampler: Euler, ")
    assert record["seed"] == 12 and record["dtype"] == "fp32" and record["device"] == "cpu"
    assert record["threads"] >= 1 and record["model"] == tiny_folder.name and len(record["model_hash"]) == 64
    assert set(record["versions"]) == {"ldm", "python", "torch", "diffusers", "transformers"}
    assert record["schedule"]["prediction_type"] == "v_prediction"
    again = Pipeline(record["prompt"], model=tiny_folder, negative_prompt=record["negative_prompt"])
    names = ("seed", "num_inference_steps", "guidance_scale", "sampler", "spacing", "height", "width")
    drawn = again.generate(**{name: record[name] for name in names})
    with Image.open(path) as image:
        assert image.tobytes() == drawn[0].tobytes() == images[1].tobytes()


def test_what_the_model_does_not_see_is_said(tiny_folder, capsys):
    long = "a cat " + "and a dog " * 20
    images = Pipeline([long, "a dog"], model=tiny_folder).generate(seed=1, **FAST)
    assert images.metadata[0]["truncated"] == images.metadata[1]["truncated"] == ""  # CLIP reads it in chunks
    assert "too long" not in capsys.readouterr().err
    assert images.metadata[0]["unknown_words"] == images.metadata[1]["unknown_words"] == []
    images = Pipeline("a zebra on a dog", model=tiny_folder).generate(seed=1, **FAST)
    assert images.metadata[0]["unknown_words"] == ["zebra"]
    assert "words that the model was never shown: zebra" in capsys.readouterr().err
    images = Pipeline("a dog", model=tiny_folder, negative_prompt="a zebra").generate(**{**FAST, "guidance_scale": 1})
    assert images.metadata[0]["unknown_words"] == []  # nobody looks at it


def test_files_are_named_by_the_prompt_and_never_overwritten(tmp_path):
    (tmp_path / "a-cat-2.png").write_text("mine")
    paths = made(["a cat", "A cat!", "猫", "../../etc/passwd"]).save(tmp_path)
    assert [p.name for p in paths] == ["a-cat.png", "a-cat-3.png", "image.png", "etc-passwd.png"]
    assert (tmp_path / "a-cat-2.png").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a-cat-2.png", *(p.name for p in paths)])
    with Image.open(paths[1]) as image:
        assert image.getpixel((0, 0)) == (40, 0, 0)


def test_a_named_file_is_replaced_and_others_are_numbered_beside_it(tmp_path):
    (tmp_path / "x.webp").write_text("old")
    paths = made(["a cat", "a dog"]).save(tmp_path / "x.webp")
    assert [p.name for p in paths] == ["x.webp", "x-2.webp"]
    with Image.open(paths[0]) as image:
        assert image.format == "WEBP"


def test_folders_formats_and_no_metadata(tmp_path):
    (path,) = made(["a cat"]).save(f"{tmp_path}/new/deep/", format="jpeg", metadata=False)
    assert path == tmp_path / "new" / "deep" / "a-cat.jpg"
    assert pictures.read_metadata(path) == pictures.Metadata()
    (path,) = made(["a cat"]).save(tmp_path / "without-suffix")
    assert path == tmp_path / "without-suffix" / "a-cat.png"


@pytest.mark.parametrize(
    ("output", "format", "message"),
    [
        ("x.gif", None, "unknown image format '.gif'"),
        ("x.png", "jpg", "ends in .png, the format is jpg"),
        ("x", "bmp", "unknown image format 'bmp'"),
        ("", None, "the name is empty"),
        ("a\0b", None, "NUL"),
        ("y" * 250 + ".png", None, "longer than 200 bytes"),
        ("file/x.png", None, "is a file, not a folder"),
        ("pipe.png", None, "no ordinary file"),
        ("/proc/nowhere/x.png", None, "choose another folder"),
    ],
)
def test_bad_places_are_refused(output, format, message, tmp_path, monkeypatch):
    import os

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ConfigError, match=message):
        made(["a cat"]).save(output, format=format)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "pipe.png"]


def test_it_shows_itself_in_a_notebook():
    images = made(["a <b>cat</b>", "a dog"])
    assert images._repr_png_().startswith(b"\x89PNG")
    shown = images._repr_html_()
    assert shown.count("data:image/png;base64,") == 2
    assert "a &lt;b&gt;cat&lt;/b&gt; · seed 7" in shown and "<b>" not in shown


def test_grids_have_a_row_for_each_prompt():
    assert made(["a"] * 4).grid().size == (16, 16)
    assert made(["a", "a", "a", "b", "b", "b"]).grid().size == (24, 16)
    assert made(["a", "b", "c"]).grid(columns=1).size == (8, 24)
