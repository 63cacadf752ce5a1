"""Drawing from pictures and around them: what stays to the bit, golden pictures, batches, records, bad values."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from ldm.colours import to_srgb
from ldm.errors import ConfigError, NumericsError
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE
from ldm.pipeline import Pipeline
from ldm.pipeline.metadata import parameters
from tests.conftest import build_tiny_model
from tests.data.colour_profiles import icc

GOLDEN = Path(__file__).parent / "golden"  # drawn by build_tiny_model in fp32; see test_golden_pictures
FAST = {"num_inference_steps": 4, "sampler": "euler", "guidance_scale": 3.0}
SIDE = 32


def picture(seed=0, width=SIDE, height=SIDE):
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def disc(width=SIDE, height=SIDE):
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).ellipse((9, 7, 22, 19), fill=255)
    return mask


@pytest.fixture(scope="module")
def model():
    return build_tiny_model()


@pytest.fixture(scope="module")
def model_of_nine(model):
    """The same model with a U-Net that takes a mask and the masked picture."""
    torch.manual_seed(3)
    unet = UNet(dataclasses.replace(model.unet.config, in_channels=9)).eval().requires_grad_(False)
    return dataclasses.replace(model, unet=unet, name="tiny-inpainting")


@pytest.fixture
def pipe(model):
    return Pipeline("a red cat", model=model, negative_prompt="a dog")


def pixels(images):
    return [image.tobytes() for image in images]


def outside(image, mask):
    return np.asarray(image.convert("RGB"))[np.asarray(mask) < 128]


# What is drawn


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["model", "model_of_nine"])
def test_pixels_outside_of_the_mask_stay_to_the_bit(kind, strength, request):
    pipe = Pipeline("a red cat", model=request.getfixturevalue(kind))
    image, mask = picture(), disc()
    (drawn,) = pipe.generate(seed=3, image=image, mask_image=mask, strength=strength, **FAST)
    assert np.array_equal(outside(drawn, mask), outside(image, mask))
    inside = np.asarray(mask) >= 128
    assert (np.asarray(drawn)[inside] != np.asarray(image)[inside]).mean() > 0.5


def test_a_thin_stroke_is_painted_whole(pipe):
    image, mask = picture(), Image.new("L", (SIDE, SIDE), 0)
    ImageDraw.Draw(mask).line((3, 5, 29, 5), fill=255)  # between the pixels that a latent begins with
    (drawn,) = pipe.generate(seed=3, image=image, mask_image=mask, strength=1.0, **FAST)
    line = np.asarray(mask) > 0
    assert (np.asarray(drawn)[line] != np.asarray(image)[line]).any(1).mean() > 0.9
    assert np.array_equal(outside(drawn, mask), outside(image, mask))


def test_greys_count_as_what_they_are_nearer_to(pipe):
    grey = disc().point(lambda value: 128 if value else 127)
    sharp, soft = (pipe.generate(seed=3, image=picture(), mask_image=m, **FAST)[0] for m in (disc(), grey))
    assert sharp.tobytes() == soft.tobytes()


def stroke(colour):
    """A disc of this colour on a transparent layer."""
    layer = Image.new("RGBA", (SIDE, SIDE))
    layer.paste(colour, mask=disc())
    return layer


def with_hole(image, mask):
    layer = image.convert("RGBA")
    layer.putalpha(mask.point(lambda level: 255 - level))
    return layer


def two_colours():
    layer = stroke("white")
    layer.paste("red", (9, 7, 16, 12))
    return layer


ALPHAS = {
    "red stroke": (stroke("red"), "a stroke on a transparent layer"),
    "black stroke": (stroke("black"), "a stroke on a transparent layer"),
    "several colours": (two_colours(), "a stroke on a transparent layer"),
    "hole": (with_hole(picture(), disc()), "the image with a hole in it"),
    "opaque": (disc().convert("RGBA"), ""),
}


@pytest.mark.parametrize("name", ALPHAS)
def test_a_masks_transparency_is_its_shape_where_it_varies(pipe, tmp_path, name, capsys):
    mask, said = ALPHAS[name]
    (expected,) = pipe.generate(seed=3, image=picture(), mask_image=disc(), **FAST)
    shape = two_colours().getchannel("A") if name == "several colours" else disc()
    mask.save(tmp_path / "mask.png")
    for given in (mask, tmp_path / "mask.png"):
        (drawn,) = pipe.generate(seed=3, image=picture(), mask_image=given, **FAST)
        assert np.array_equal(outside(drawn, shape), outside(picture(), shape))
        assert name == "several colours" or drawn.tobytes() == expected.tobytes()
        assert said in capsys.readouterr().err


def test_white_and_black_beside_transparency_stay_what_they_are(pipe, capsys):
    mask = disc().convert("RGBA")
    mask.paste((0, 0, 0, 0), (0, 0, SIDE, 4))
    (drawn,) = pipe.generate(seed=3, image=picture(), mask_image=mask, **FAST)
    assert np.array_equal(outside(drawn, disc()), outside(picture(), disc()))
    assert "what is transparent counts as black" in capsys.readouterr().err


def test_colours_of_an_initial_image_are_what_its_profile_says(pipe, tmp_path):
    """From a file and from memory, for the image and for its mask; the digest is that of the pixels in sRGB."""
    wide = picture()
    wide.info["icc_profile"] = icc("Display P3")
    wide.save(tmp_path / "p3.png", icc_profile=wide.info["icc_profile"])
    plain = to_srgb(wide)
    assert np.abs(np.asarray(plain, int) - np.asarray(wide, int)).max() > 8
    drawn = [pipe.generate(seed=3, image=image, **FAST) for image in (plain, wide, tmp_path / "p3.png")]
    assert len({images[0].tobytes() for images in drawn}) == 1
    assert len({images.metadata[0]["image_sha256"] for images in drawn}) == 1
    other = pipe.generate(seed=3, image=picture(), **FAST)
    assert other[0].tobytes() != drawn[0][0].tobytes()


def test_the_less_strength_the_more_of_the_picture_stays(pipe):
    image = picture()

    def distance(strength):
        (drawn,) = pipe.generate(seed=3, image=image, strength=strength, **{**FAST, "num_inference_steps": 10})
        return np.abs(np.asarray(drawn, float) - np.asarray(image, float)).mean()

    calls = []
    pipe.generate(seed=3, image=image, strength=0.5, callback=lambda i, x, x0: calls.append(i), **FAST)
    assert calls == [0, 1]
    (decoded,) = pipe.generate(seed=3, image=image, strength=0.1, **{**FAST, "num_inference_steps": 10})
    assert decoded.size == image.size
    assert distance(0.1) < distance(1.0)


@pytest.mark.parametrize("size, drawn_size", [((37, 50), (32, 48)), ((64, 32), (64, 32))])
def test_the_size_is_the_pictures_brought_down_to_what_the_model_has(pipe, size, drawn_size, capsys):
    (drawn,) = pipe.generate(seed=3, image=picture(0, *size), **FAST)
    assert drawn.size == drawn_size
    said = capsys.readouterr().err
    assert ("resized to 32x48" in said) == (size != drawn_size)


def test_a_file_is_turned_upright_and_its_transparency_laid_on_white(pipe, tmp_path):
    image, turned = picture(0, 48, 32), tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    plain = pixels(pipe.generate(seed=3, image=image, **FAST))
    assert pixels(pipe.generate(seed=3, image=turned, **FAST)) == plain
    glass = Image.new("RGBA", (SIDE, SIDE), (200, 0, 0, 0))
    white = Image.new("RGB", (SIDE, SIDE), "white")
    assert pixels(pipe.generate(seed=3, image=glass, **FAST)) == pixels(pipe.generate(seed=3, image=white, **FAST))


def test_outpainting_grows_the_picture_and_keeps_it_to_the_bit(pipe):
    image = picture()
    (drawn,) = pipe.generate(seed=3, image=image, outpaint={"left": 16, "top": 8}, **FAST)
    assert drawn.size == (48, 40)
    assert drawn.crop((16, 8, 48, 40)).tobytes() == image.tobytes()
    assert len(set(drawn.crop((0, 0, 16, 40)).getdata())) > 50
    (small,) = pipe.generate(seed=3, image=image, outpaint={"left": 16}, width=32, **FAST)
    assert small.size == (32, 32)
    (masked,) = pipe.generate(seed=3, image=image, outpaint={"right": 8}, mask_image=disc(), **FAST)
    assert np.array_equal(outside(masked.crop((0, 0, 32, 32)), disc()), outside(image, disc()))


def test_variations_go_from_one_seeds_noise_to_the_others(pipe):
    def draw(**settings):
        return np.asarray(pipe.generate(**settings, **FAST)[0], float)

    first, other = draw(seed=3), draw(seed=9)
    assert np.array_equal(draw(seed=3, variation_seed=9, variation_strength=1.0), other)
    little, more = (draw(seed=3, variation_seed=9, variation_strength=s) for s in (0.05, 0.5))
    assert 0 < np.abs(little - first).mean() < np.abs(more - first).mean()


def test_variations_of_several_pictures_count_their_own_seed(pipe):
    images = pipe.generate(num_images=3, seed=3, subseed=9, subseed_strength=0.3, **FAST)
    assert images.seeds == [3, 3, 3]
    assert [record["variation_seed"] for record in images.metadata] == [9, 10, 11]
    assert len(set(pixels(images))) == 3
    alone = pipe.generate(seed=3, variation_seed=10, variation_strength=0.3, **FAST)
    assert pixels(alone) == pixels(images[1:2])
    drawn = pipe.generate(seed=3, variation_strength=0.3, **FAST)
    assert 0 <= drawn.metadata[0]["variation_seed"] < 2**32


def test_hires_draws_twice_and_tells_every_step(pipe):
    seen = []
    settings = {"hires_scale": 1.5, "hires_steps": 6, "hires_strength": 0.5}
    images = pipe.generate(seed=3, callback=lambda i, x, x0: seen.append((i, x.shape[-1])), **settings, **FAST)
    assert images[0].size == (48, 48)
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 6), (5, 6), (6, 6)]


# The same in every batch


CASES = {
    "image": {"image": picture(), "strength": 0.5},
    "mask": {"image": picture(), "mask_image": disc()},
    "outpaint": {"image": picture(), "outpaint": {"left": 8}},
    "variation": {"variation_seed": 4, "variation_strength": 0.4},
    "hires": {"hires_scale": 1.5, "hires_strength": 0.5},
    "tiles": {"vae_tiling": True, "height": 64, "width": 64},
}


@pytest.mark.parametrize("case", CASES)
def test_bits_do_not_depend_on_the_batch(pipe, case):
    together = pixels(pipe.generate(num_images=3, seed=5, **CASES[case], **FAST))
    assert len(set(together)) == 3
    for size in (1, 2):
        assert pixels(pipe.generate(num_images=3, seed=5, batch_size=size, **CASES[case], **FAST)) == together


def test_a_list_holds_one_picture_for_each_prompt(model):
    pipe = Pipeline(["a red cat", "a dog"], model=model)
    images = pipe.generate(seed=5, image=[picture(1), picture(2)], num_images=2, **FAST)
    for k, prompt in enumerate(("a red cat", "a dog")):
        alone = Pipeline(prompt, model=model).generate(seed=5, image=picture(k + 1), num_images=2, **FAST)
        assert pixels(alone) == pixels(images[2 * k : 2 * k + 2])


@pytest.mark.parametrize("case", ["mask", "hires"])
def test_offload_changes_no_bit(model, pipe, case):
    """On a CPU it lends copies of the parts, as on a GPU."""
    lent = Pipeline("a red cat", model=model, negative_prompt="a dog", offload=True)
    assert pixels(lent.generate(seed=5, **CASES[case], **FAST)) == pixels(pipe.generate(seed=5, **CASES[case], **FAST))


@pytest.mark.parametrize("case", ["image", "mask", "hires"])
def test_a_picture_whose_encoding_overflows_is_drawn_again_in_fp32(tiny_folder, case, monkeypatch, capsys):
    encode_at_once = VAE.encode

    def unstable(self, images, *args, **kwargs):
        if self.dtype == torch.bfloat16:
            raise NumericsError("the VAE gave NaN or infinity in encoding")
        return encode_at_once(self, images, *args, **kwargs)

    full = Pipeline("a red cat", model=tiny_folder, dtype="fp32").generate(seed=5, **CASES[case], **FAST)
    monkeypatch.setattr(VAE, "encode", unstable)
    mended = Pipeline("a red cat", model=tiny_folder, dtype="bf16").generate(seed=5, **CASES[case], **FAST)
    assert pixels(mended) == pixels(full) and mended.metadata[0]["dtype"] == "fp32"
    assert "seed 5: NaN in bf16" in capsys.readouterr().err


# Golden pictures


@pytest.mark.parametrize("case", ["outpaint", "variation", "hires", "mask"])
def test_golden_pictures(pipe, case):
    """Within 2/255 of the committed files, which must be there."""
    (drawn,) = pipe.generate(seed=11, **CASES[case], **FAST)
    with Image.open(GOLDEN / f"{case}.png") as golden:
        assert golden.size == drawn.size
        apart = np.abs(np.asarray(golden, int) - np.asarray(drawn, int))
    assert apart.max() <= 2


# Records


@pytest.mark.parametrize(
    "case, line",
    [
        ("image", "Denoising strength: 0.5, "),
        ("mask", "Denoising strength: 0.8, Mask blur: 0, "),
        ("outpaint", "Denoising strength: 1.0, Mask blur: 0, "),
        ("variation", "Variation seed: 4, Variation seed strength: 0.4, "),
        ("hires", "Denoising strength: 0.5, Hires upscale: 1.5, Hires steps: 2, Hires upscaler: Lanczos, "),
    ],
)
def test_a1111s_text_says_it_in_its_words(pipe, case, line):
    record = pipe.generate(seed=1, **CASES[case], **FAST).metadata[0]
    assert line in parameters(record)
    json.dumps(record)


def test_the_record_knows_pictures_by_path_and_pixels(pipe, tmp_path):
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "b.webp", lossless=True)
    records = [
        pipe.generate(seed=1, image=image, mask_image=disc(), **FAST).metadata[0]
        for image in (tmp_path / "a.png", str(tmp_path / "b.webp"), picture())
    ]
    assert [record["image"] for record in records] == [str(tmp_path / "a.png"), str(tmp_path / "b.webp"), "given"]
    assert len({record["image_sha256"] for record in records}) == 1
    assert records[0]["mask_image"] == "given" and records[0]["mask_sha256"] != records[0]["image_sha256"]
    assert "image" not in pipe.generate(seed=1, **FAST).metadata[0]


@pytest.mark.parametrize("case", ["image", "mask", "outpaint", "variation", "hires"])
def test_pictures_replay_from_their_own_file(tiny_folder, tmp_path, case, monkeypatch, capsys):
    from ldm.cli import main

    monkeypatch.chdir(tmp_path)
    picture().save("in.png")
    disc().save("mask.png")
    files = {"image": "in.png", "mask_image": "mask.png"}
    own = {name: files.get(name, value) for name, value in CASES[case].items()}
    pipe = Pipeline("a red cat", model=tiny_folder, dtype="fp32")
    images = pipe.generate(seed=5, **own, **FAST)
    (path,) = images.save("first.png")
    assert main(["generate", "--from", "first.png", "-o", "again.png", "--model", str(tiny_folder)]) == 0
    assert "differ" not in capsys.readouterr().err
    with Image.open("again.png") as again, Image.open(path) as first:
        assert again.tobytes() == first.tobytes()


def test_a_replay_says_that_a_picture_is_another_one_or_not_at_hand(tiny_folder, tmp_path, monkeypatch, capsys):
    from ldm.cli import main

    monkeypatch.chdir(tmp_path)
    picture().save("in.png")
    pipe = Pipeline("a red cat", model=tiny_folder, dtype="fp32")
    pipe.generate(seed=5, image="in.png", **FAST).save("first.png")
    picture(1).save("in.png")
    again = ["generate", "--from", "first.png", "-o", "again.png", "--model", str(tiny_folder)]
    assert main(again) == 0
    assert "image is another image than the one that was drawn from: it will differ" in capsys.readouterr().err
    Path("in.png").unlink()
    assert main(again) == 2
    assert "in.png" in capsys.readouterr().err
    pipe.generate(seed=5, image=picture(), **FAST).save("memory.png")
    assert main(["generate", "--from", "memory.png"]) == 2
    assert "was drawn from an image that has no file" in capsys.readouterr().err
    assert main(["generate", "--from", "memory.png", "--set", "image=first.png", *again[-4:]]) == 0


# Bad values


@pytest.fixture
def files(tmp_path):
    picture().save(tmp_path / "in.png")
    disc(40, 32).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


BAD = {
    "no such file": ({"image": "none.png"}, "image: 'none.png': no such image"),
    "no picture": ({"image": "text.png"}, r"image: text.png: "),
    "a folder": ({"image": "."}, "image: .*directory"),
    "a number": ({"image": 3}, "image: expected an image or its file, got 3"),
    "NUL": ({"image": "a\0b"}, "image: .*null"),
    "two for one": ({"image": ["in.png", "in.png"]}, "image: 2 of them for 1 prompts"),
    "mask alone": ({"mask_image": "in.png"}, "mask_image: a mask needs an image"),
    "mask of another size": ({"image": "in.png", "mask_image": "wide.png"}, "mask_image: the mask is 40x32, .* 32x32"),
    "mask without white": (
        {"image": "in.png", "mask_image": Image.new("RGB", (32, 32), "red")},
        "the mask has no white: its brightest grey is 76: nothing would be painted; paint in white",
    ),
    "transparent mask": ({"image": "in.png", "mask_image": Image.new("RGBA", (32, 32))}, "is transparent everywhere"),
    "large photo": (
        {"image": Image.new("RGB", (512, 384))},
        "image: the image of 512x384 has 192 times the 32x32 .*; give --width 40 --height 32, or this size by --width",
    ),
    "black mask": ({"image": "in.png", "mask_image": Image.new("L", (32, 32))}, "mask_image: the mask is black"),
    "strength 0": ({"image": "in.png", "strength": 0}, "strength: 0 is not above 0 and up to 1"),
    "strength NaN": ({"image": "in.png", "strength": float("nan")}, "strength: nan is not above 0"),
    "strength 2": ({"image": "in.png", "strength": 2.0}, "strength: 2 is not"),
    "strength text": ({"image": "in.png", "strength": "much"}, "strength: expected a number, got 'much'"),
    "no step": ({"image": "in.png", "strength": 0.1}, "strength: 0.1 of 4 steps leaves none.*use at least 0.25"),
    "strength alone": ({"strength": 0.5}, "strength: strength needs an image"),
    "outpaint alone": ({"outpaint": {"left": 8}}, "outpaint: outpainting needs an image"),
    "outpaint up": ({"image": "in.png", "outpaint": {"up": 8}}, "outpaint: unknown side 'up'"),
    "outpaint 0": ({"image": "in.png", "outpaint": {"left": 0}}, "outpaint: adds no pixel"),
    "outpaint 8.5": ({"image": "in.png", "outpaint": {"left": 8.5}}, "outpaint left: expected a whole number"),
    "outpaint 7": ({"image": "in.png", "outpaint": {"left": 7}}, "outpaint left: 7 is not a multiple of 8.*use 8"),
    "outpaint without room": ({"image": "in.png", "outpaint": {"left": 8}, "width": 8}, "outpaint: no room .* in 8x32"),
    "variation seed alone": ({"variation_seed": 3}, "variation_seed: needs a variation_strength above 0"),
    "variation 2": ({"variation_strength": 2}, "variation_strength: 2 is not above 0"),
    "variation seeds": ({"variation_strength": 0.1, "variation_seed": [1, 2]}, "variation_seed: 2 seeds for 1 images"),
    "hires 1": ({"hires_scale": 1}, "hires_scale: 1 is not above 1 and up to 8"),
    "hires NaN": ({"hires_scale": float("nan")}, "hires_scale: nan is not a finite number"),
    "hires steps alone": ({"hires_steps": 3}, "hires_steps: hires_steps needs hires_scale"),
    "hires no step": ({"hires_scale": 2, "hires_strength": 0.1}, "hires_strength: 0.1 of 4 steps leaves none"),
    "hires and image": ({"hires_scale": 2, "image": "in.png"}, "hires_scale: hires-fix begins at a prompt"),
    "tiling": ({"vae_tiling": 3}, 'vae_tiling: expected True, False or "auto", got 3'),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_one_line(pipe, files, name, monkeypatch):
    monkeypatch.chdir(files)
    keywords, message = BAD[name]
    with pytest.raises(ConfigError, match=message) as caught:
        pipe.generate(seed=1, **keywords, **FAST)
    assert "\n" not in str(caught.value)


def test_pictures_of_several_sizes_need_one_that_is_said(model):
    pipe = Pipeline(["a red cat", "a dog"], model=model)
    images = [picture(1), picture(2, 48, 32)]
    with pytest.raises(ConfigError, match=r"image: the images are of several sizes \(32x32, 48x32\)"):
        pipe.generate(seed=1, image=images, **FAST)
    assert {image.size for image in pipe.generate(seed=1, image=images, width=40, height=32, **FAST)} == {(40, 32)}


def test_an_inpainting_model_asks_for_a_mask(model_of_nine):
    pipe = Pipeline("a red cat", model=model_of_nine)
    for keywords in ({}, {"image": picture()}):
        with pytest.raises(ConfigError, match="tiny-inpainting is an inpainting model; give image and mask_image"):
            pipe.generate(seed=1, **keywords, **FAST)
    (drawn,) = pipe.generate(seed=1, image=picture(), outpaint={"bottom": 8}, **FAST)
    assert drawn.size == (32, 40)


def test_sizes_above_the_models_own_are_warned_of_once(pipe, capsys):
    for _ in range(2):
        pipe.generate(seed=1, height=64, width=32, **FAST)
    assert capsys.readouterr().err.count("more than the 32x32 that the model was trained on") == 1
    pipe.generate(seed=1, hires_scale=2.0, **FAST)
    assert capsys.readouterr().err == ""


@pytest.fixture
def one_size(model, tmp_path):
    """The model as if its card said that it knows one size."""
    info = {**model.info, "ldm": {"hires_strength": 0.3}}
    return Pipeline("a red cat", model=dataclasses.replace(model, info=info))


def test_a_card_says_how_much_of_the_larger_run_is_run(pipe, one_size, capsys):
    with_card, usual = (one.generate(seed=1, hires_scale=2.0, **FAST) for one in (one_size, pipe))
    assert (with_card.metadata[0]["hires_strength"], usual.metadata[0]["hires_strength"]) == (0.3, 0.7)
    said = one_size.generate(seed=1, hires_scale=2.0, hires_strength=0.3, **FAST)
    assert pixels(said) == pixels(with_card) != pixels(usual)
    assert capsys.readouterr().err == ""
    few = one_size.generate(seed=1, hires_scale=2.0, hires_steps=2, **FAST)  # 0.3 of 2 would leave no step
    assert few.metadata[0]["hires_strength"] == 0.5 and "keeps them" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"width": 64}, "64x32 is more than the 32x32 that the model was trained on: it may repeat itself; try hires"),
        ({"width": 24, "height": 24}, "24x24 is less than the 32x32 that the model was trained on: shapes may fall"),
        ({"width": 24}, ""),
        ({"hires_scale": 2.0, "hires_strength": 0.5}, "64x64 is more than .*; a hires_strength up to 0.3 keeps them"),
        ({"image": picture(1, 64, 64), "strength": 0.5}, "64x64 is more than .*; a strength up to 0.3 keeps shapes"),
        ({"image": picture(1, 64, 64), "strength": 0.3}, ""),
        ({"image": picture(), "outpaint": {"left": 32}}, "64x32 is more than .* on: it may repeat itself$"),
    ],
)
def test_sizes_that_spoil_an_image_are_warned_of(one_size, settings, line, capsys):
    one_size.generate(seed=1, **settings, **FAST)
    said = capsys.readouterr().err.strip()
    assert re.search(line, said) if line else not said


def test_a_card_with_an_impossible_number_is_one_line(model):
    wrong = dataclasses.replace(model, info={**model.info, "ldm": {"hires_strength": 1.5}})
    with pytest.raises(ConfigError, match=r"hires_strength: the model's card says 1\.5"):
        Pipeline("a red cat", model=wrong).generate(seed=1, hires_scale=2.0, **FAST)
