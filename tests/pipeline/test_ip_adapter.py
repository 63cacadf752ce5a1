"""IP-Adapters in pipelines: images equal diffusers', with negative controls; batches, masks, levels, bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.checkpoint.controlnet import save_controlnet
from ldm.cli import main
from ldm.errors import ConfigError, LdmError
from ldm.images import read_metadata
from ldm.nn.ip_adapter import IPAdapter, IPAdapterConfig, cross_attentions
from ldm.pipeline import Pipeline
from ldm.pipeline.sources import open_mask
from ldm.render.drawing.runner import render
from tests.conftest import build_tiny_model
from tests.pipeline.test_control import apart, drawing, lora_file, loud

SIDE = 64
STEPS = {"num_inference_steps": 4, "sampler": "ddim", "guidance_scale": 3.0}
SIZE = {"height": SIDE, "width": SIDE}
TOWER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
TOWER |= {"image_size": 28, "patch_size": 14, "projection_dim": 20, "hidden_act": "gelu"}


def adapter_file(unet, path, kind, seed=0):
    """A file of random weights that moves pixels."""
    torch.manual_seed(seed)
    layers = tuple(layer.to_k.out_features for layer in cross_attentions(unet).values())
    features = TOWER["projection_dim" if kind == "plain" else "hidden_size"]
    config = IPAdapterConfig(kind, unet.config.text_width, features, layers, 4, hidden=16, inner=128, depth=4)
    net = IPAdapter(config)
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5 if name.startswith("ip_adapter") else 0.3)
    save_file(net.state_dict(), path)
    return path


def photo(seed):
    """Of many colours, wide or high, larger than the tower's input."""
    size = ((70, 50), (40, 60), (64, 64))[seed % 3]
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def model():
    return build_tiny_model()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """A folder of adapters for the tiny model, with their tower."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("adapters")
    for i, kind in enumerate(("plain", "plus", "full")):
        adapter_file(model.unet, folder / f"{kind}.safetensors", kind, i)
    torch.manual_seed(9)
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**TOWER)).eval()
    for parameter in tower.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    tower.save_pretrained(folder / "image_encoder")
    return folder


# Against diffusers


@pytest.fixture(scope="module")
def peer_parts(tiny_folder):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    parts = dict(StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None).components)
    parts["scheduler"] = DDIMScheduler.from_pretrained(tiny_folder, subfolder="scheduler")
    return parts


def of_peer(parts, files, kinds, images, scale, masks=None):
    from diffusers import StableDiffusionPipeline
    from diffusers.image_processor import IPAdapterMaskProcessor

    pipe = StableDiffusionPipeline(**{**parts, "image_encoder": None, "feature_extractor": None})
    names = [f"{kind}.safetensors" for kind in kinds]
    pipe.load_ip_adapter(str(files), subfolder="", weight_name=names, low_cpu_mem_usage=False)
    pipe.set_ip_adapter_scale(scale)
    pipe.set_progress_bar_config(disable=True)
    more = {}
    if masks is not None:
        fitted = [IPAdapterMaskProcessor().preprocess(one, height=SIDE, width=SIDE) for one in masks]
        more["cross_attention_kwargs"] = {"ip_adapter_masks": [one.transpose(0, 1) for one in fitted]}
    call = {"generator": torch.Generator().manual_seed(7), "num_inference_steps": 4, "guidance_scale": 3.0}
    found = pipe("a red cat", negative_prompt="a dog", ip_adapter_image=images, **SIZE, **call, **more).images[0]
    pipe.unet.unload_attn_processors() if hasattr(pipe.unet, "unload_attn_processors") else None
    pipe.unload_ip_adapter()
    return found


def half(side, left):
    mask = Image.new("L", (side, side), 0)
    mask.paste(255, (0, 0, side // 2, side) if left else (side // 2, 0, side, side))
    return mask


LEVELS = {"down": {"block_0": [0.8]}, "up": {"block_1": [0.0, 1.3]}}
CASES = {  # adapters, their images, scale, masks
    "plain": (["plain"], [photo(0)], 0.8, None),
    "plus": (["plus"], [photo(1)], 1.0, None),
    "full": (["full"], [photo(2)], 0.6, None),
    "several": (["plain"], [[photo(0), photo(1)]], 0.7, None),
    "levels": (["plus"], [photo(0)], LEVELS, None),
    "side": (["plain"], [photo(0)], {"up": 1.0, "mid": 0.5}, None),
    "two": (["plain", "plus"], [photo(0), [photo(1), photo(2)]], [0.5, LEVELS], None),
    "masks": (["plus"], [[photo(0), photo(1)]], 1.0, [[half(32, True), half(SIDE, False)]]),
    "weighed": (["plain"], [[photo(0), photo(1)]], [[0.4, 1.2]], [[half(SIDE, True), half(SIDE, False)]]),
}


LONG = ("several", "levels", "side", "weighed")  # of which "two" and "masks" have the most


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in LONG else c for c in CASES])
def test_images_equal_diffusers(case, peer_parts, files, tiny_folder):
    kinds, images, scale, masks = CASES[case]
    theirs = of_peer(peer_parts, files, kinds, images, scale, masks)
    pipe = Pipeline(
        "a red cat", tiny_folder, negative_prompt="a dog", ip_adapter=[files / f"{k}.safetensors" for k in kinds]
    )
    call = {"seed": 7, "ip_adapter_image": images, "ip_adapter_scale": scale, "ip_adapter_mask": masks, **STEPS, **SIZE}
    assert apart(pipe.generate(**call)[0], theirs) <= 1
    other = [[photo(4)] * len(one) if isinstance(one, list) else photo(4) for one in images]
    assert apart(pipe.generate(**{**call, "ip_adapter_image": other})[0], theirs) > 5
    without = Pipeline("a red cat", tiny_folder, negative_prompt="a dog").generate(seed=7, **STEPS, **SIZE)[0]
    assert apart(without, theirs) > 5
    if masks is not None:
        swapped = [[*reversed(masks[0])]]
        assert apart(pipe.generate(**{**call, "ip_adapter_mask": swapped})[0], theirs) > 5


# Our own promises


def test_the_same_bits_in_any_batch_and_a_list_for_each_prompt(model, files):
    adapters = [files / "plus.safetensors"]
    images = [photo(0), [photo(1), photo(2)], photo(3)]
    pipe = Pipeline(["a cat", "a dog", "a red cat"], model, ip_adapter=adapters)
    together = pipe.generate(seed=3, ip_adapter_image=images, batch_size=3, **STEPS)
    for prompt, image, drawn in zip(pipe.prompts, images, together):
        alone = Pipeline(prompt, model, ip_adapter=adapters).generate(seed=3, ip_adapter_image=[image], **STEPS)
        assert alone[0].tobytes() == drawn.tobytes()
    assert apart(together[0], together[1]) > 5


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": "pag", "guidance_interval": (0.3, 0.8)},
        {"guidance_scale": 1.0, "guidance": "pag", "step_cache": 2},
        {"guidance_scale": 1.0, "hires_scale": 2.0},
    ],
)
def test_every_guidance_and_sampler_of_two_evaluations(model, files, settings):
    settings = {**STEPS, "sampler": "heun", **settings}
    pipe = Pipeline("a cat [a dog:0.5]", model, ip_adapter=[files / "plain.safetensors", files / "plus.safetensors"])
    three = pipe.generate(seed=[1, 2, 3], num_images=3, ip_adapter_image=[photo(0), photo(1)], **settings)
    (one,) = pipe.generate(seed=2, ip_adapter_image=[photo(0), photo(1)], **settings)
    assert one.tobytes() == three[1].tobytes()
    assert apart(pipe.generate(seed=2, ip_adapter_image=[photo(0), photo(2)], **settings)[0], one) > 5


def test_beside_a_lora_a_controlnet_and_an_initial_image(model, files, tmp_path):
    save_controlnet(loud(model.unet), tmp_path / "net", torch.float32)
    extra = {"controlnet": tmp_path / "net", "lora": lora_file(tmp_path / "lora.safetensors")}
    pipe = Pipeline("a cat", model, ip_adapter=files / "plain.safetensors", **extra)
    call = {"seed": 1, "control_image": drawing(1), "image": drawing(2), "mask_image": half(SIDE, True), **STEPS}
    call["controlnet_conditioning_scale"] = 0.01  # else nothing else shows
    one = pipe.generate(ip_adapter_image=photo(0), **call)[0]
    assert apart(pipe.generate(ip_adapter_image=photo(1), **call)[0], one) > 5
    off = pipe.generate(ip_adapter_image=photo(0), ip_adapter_scale=0.0, **call)[0]
    assert off.tobytes() == Pipeline("a cat", model, **extra).generate(**call)[0].tobytes()
    assert np.array_equal(np.asarray(one)[:, SIDE // 2 :], np.asarray(drawing(2))[:, SIDE // 2 :])


def test_parts_that_are_lent(tiny_folder, files):
    call = {"seed": 1, "ip_adapter_image": photo(0), **STEPS}
    one, other = (
        Pipeline("a cat", tiny_folder, ip_adapter=files / "plus.safetensors", offload=lent).generate(**call)[0]
        for lent in (False, True)
    )
    assert one.tobytes() == other.tobytes()


def test_metadata_and_the_tower_that_is_found(model, files, tmp_path):
    photo(0).save(tmp_path / "photo.png")
    call = {"seed": 1, "ip_adapter_image": str(tmp_path / "photo.png"), "ip_adapter_scale": 0.5, **STEPS}
    near = Pipeline("a cat", model, ip_adapter=str(files / "plain.safetensors")).generate(**call)
    named = Pipeline("a cat", model, ip_adapter=files / "plain.safetensors", image_encoder=files / "image_encoder")
    assert named.generate(**call)[0].tobytes() == near[0].tobytes()
    said = near.metadata[0]
    assert said["ip_adapter"][0]["path"] == str((files / "plain.safetensors").resolve())
    assert said["image_encoder"]["path"] == str((files / "image_encoder").resolve())
    assert len(said["ip_adapter"][0]["hash"]) == len(said["image_encoder"]["hash"]) == 64
    assert said["ip_adapter_image"] == [[str((tmp_path / "photo.png").resolve())]] and said["ip_adapter_scale"] == (
        0.5,
    )
    assert len(said["ip_adapter_image_sha256"][0][0]) == 64 and "ip_adapter_mask" not in said
    with pytest.raises(ConfigError, match="a denoiser has no ControlNets and IP-Adapters"):
        named.denoiser(seed=1)
    assert "ip_adapter_scale" not in Pipeline("a cat", model).generate(seed=1, **STEPS).metadata[0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({}, "an IP-Adapter needs an image to show"),
        ({"ip_adapter_image": "nothing.png"}, "no such image"),
        ({"ip_adapter_image": 7}, "expected an image or its file"),
        ({"ip_adapter_image": photo(0), "ip_adapter_scale": [1, 1]}, "2 of them for 1 IP-Adapters"),
        ({"ip_adapter_image": photo(0), "ip_adapter_scale": float("nan")}, "expected a finite number"),
        ({"ip_adapter_image": photo(0), "ip_adapter_scale": [[1.0]]}, "need as many masks"),
        ({"ip_adapter_image": photo(0), "ip_adapter_scale": {"upp": 1}}, "no attention in 'upp'; did you mean 'up'"),
        ({"ip_adapter_image": photo(0), "ip_adapter_scale": {"up": {"block_0": 1}}}, "no attention in 'block_0'"),
        ({"ip_adapter_image": photo(0), "ip_adapter_scale": {"up": {"block_1": [1] * 3}}}, "has 2 transformers, not 3"),
        ({"ip_adapter_image": photo(0), "ip_adapter_mask": [[photo(0)] * 2]}, "2 masks for 1 images"),
        ({"ip_adapter_images": photo(0)}, "did you mean"),
    ],
)
def test_bad_settings_are_one_line(model, files, call, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Pipeline("a cat", model, ip_adapter=files / "plain.safetensors").generate(**call)
    assert "\n" not in str(caught.value)


def test_what_is_given_without_an_adapter_or_a_tower(model, files, tmp_path):
    for word in ("ip_adapter_image", "ip_adapter_scale", "ip_adapter_mask"):
        with pytest.raises(ConfigError, match="needs an"):
            Pipeline("a cat", model).generate(**{word: 0.5})
    with pytest.raises(ConfigError, match="needs an ip_adapter"):
        Pipeline("a cat", model, image_encoder=files / "image_encoder")
    alone = shutil.copy(files / "plain.safetensors", tmp_path)
    with pytest.raises(ConfigError, match="needs CLIP's vision tower"):
        Pipeline("a cat", model, ip_adapter=alone)
    with pytest.raises(ConfigError, match="belongs to Pipeline"):
        Pipeline("a cat", model).generate(ip_adapter=alone)


# The command line, prompt files, replays


@pytest.fixture
def here(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = shutil.copytree(files, tmp_path / "files")
    for i in range(3):
        photo(i).save(f"{i}.png")
    half(SIDE, True).save("left.png")
    half(SIDE, False).save("right.png")
    return files


def test_the_command_and_its_replay(here, tiny_folder, capsys):
    words = ["generate", "a cat", "--model", str(tiny_folder), "--steps", "4", "--seed", "1"]
    shown = ["--ip-adapter", str(here / "plus.safetensors"), "--ip-adapter-image", "0.png"]
    shown += ["--ip-adapter-image", "1.png", "--ip-adapter-mask", "left.png", "--ip-adapter-mask", "right.png"]
    levels = [*shown, "--ip-adapter-scale", '{"up": {"block_1": [0, 1]}}']
    assert main([*words, *levels, "-o", "one.png"]) == 0
    assert main(["generate", "--from", "one.png", "--model", str(tiny_folder), "-o", "again.png"]) == 0
    assert main([*words, "-o", "plain.png"]) == 0
    assert main([*words, *shown, "--ip-adapter-scale", "0.6", "-o", "all.png"]) == 0
    one, again, plain, whole = (Image.open(f"{name}.png") for name in ("one", "again", "plain", "all"))
    assert one.tobytes() == again.tobytes() and min(apart(one, plain), apart(one, whole)) > 5
    assert "will differ" not in capsys.readouterr().err
    said = read_metadata("one.png").ldm
    assert said["ip_adapter_scale"] == [{"up": {"block_1": [0, 1]}}] and len(said["ip_adapter_image"][0]) == 2
    photo(5).save("0.png")
    assert main(["generate", "--from", "one.png", "--model", str(tiny_folder), "-o", "third.png"]) == 0
    assert "ip_adapter_image is another image" in capsys.readouterr().err
    adapter_file(build_tiny_model().unet, here / "plus.safetensors", "plus", seed=8)
    assert main(["generate", "--from", "one.png", "--model", str(tiny_folder), "-o", "fourth.png"]) == 0
    assert "ip_adapter is another file" in capsys.readouterr().err
    for wrong in (["--ip-adapter-image", "0.png"], shown[:2], [*shown, "--image-encoder", "nothing"]):
        assert main([*words, *wrong]) in (2, 3)
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_prompt_files_draw_the_same(here, tiny_folder):
    plain, plus = str(here / "plain.safetensors"), str(here / "plus.safetensors")
    Path("p.txt").write_text(
        f"a cat --ip-adapter {plain} --ip-adapter-image 0.png --ip-adapter-scale 0.6 --d 1\n"
        f"a cat --ip-adapter {plain} --ip-adapter-image 1.png --ip-adapter-scale 0.6 --d 1\n"
        f"a cat --ip-adapter {plain} --ip-adapter-image 1.png --ip-adapter-image 2.png --ip-adapter-scale 0.6 --d 4\n"
        "a dog --d 3\n"
    )
    two = {"prompt": "a cat", "seed": 2, "ip_adapter": [plain, plus], "ip_adapter_image": ["0.png", ["1.png", "2.png"]]}
    two |= {"ip_adapter_scale": [0.5, {"mid": 1}], "image_encoder": str(here / "image_encoder")}
    Path("p.jsonl").write_text(json.dumps(two))
    settings = {"model": str(tiny_folder), "num_inference_steps": 4}
    drawn = [*render("p.txt", "out", **settings).paths, *render("p.jsonl", "more", **settings).paths]
    pipe, call = Pipeline("a cat", tiny_folder, ip_adapter=plain), {"num_inference_steps": 4, "ip_adapter_scale": 0.6}
    both = Pipeline("a cat", tiny_folder, ip_adapter=[plain, plus])
    expected = [
        pipe.generate(seed=1, ip_adapter_image="0.png", **call),
        pipe.generate(seed=1, ip_adapter_image="1.png", **call),
        pipe.generate(seed=4, ip_adapter_image=["1.png", "2.png"], **call),
        Pipeline("a dog", tiny_folder).generate(seed=3, num_inference_steps=4),
        both.generate(
            seed=2,
            num_inference_steps=4,
            ip_adapter_image=two["ip_adapter_image"],
            ip_adapter_scale=two["ip_adapter_scale"],
        ),
    ]
    for path, (image,) in zip(drawn, expected, strict=True):
        assert Image.open(path).tobytes() == image.tobytes(), path
    again = render(None, "again", sources=["out", "more"], model=str(tiny_folder)).paths
    assert [Image.open(path).tobytes() for path in again] == [Image.open(path).tobytes() for path in drawn]
    before = render("p.txt", "out", **settings).counts
    assert before["finished_before"] == 4 and before["rendered"] == 0
    lines = [
        {"prompt": "a cat", "ip_adapter_image": "0.png", "seed": 1},
        {"prompt": "a cat", "ip_adapter_scale": {"up": 1}},
    ]
    shared = render(lines, "shared", ip_adapter=plain, ip_adapter_scale=0.6, **settings)  # the images are the lines'
    assert shared.paths[0].read_bytes() and shared.counts["bad_lines"] == 1
    assert Image.open(shared.paths[0]).tobytes() == expected[0][0].tobytes()
    with pytest.raises(LdmError, match="does not exist"):
        render(lines, "shared", ip_adapter="none.safetensors", **settings)
    with pytest.raises(LdmError, match=r"1\.png"):
        render(lines, "shared", ip_adapter="1.png", **settings)
    photo(7).save("2.png")  # another image is another job
    assert render("p.txt", "out", **settings).counts["rendered"] == 1


def test_a_mask_s_transparency_is_its_shape(tmp_path):
    plain = open_mask(half(32, True), "ip_adapter_mask")[0]
    layer = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    for colour in ("black", "white", "red"):  # a stroke of any colour on a transparent layer
        layer.paste(colour, (0, 0, 16, 32))
        layer.save(tmp_path / "stroke.png")
        for value in (layer, tmp_path / "stroke.png"):
            assert open_mask(value, "ip_adapter_mask")[0].tobytes() == plain.tobytes()
    layer.paste("white", (0, 0, 16, 32))
    layer.paste("black", (0, 16, 16, 32))  # white and black: what is transparent is black
    mask = open_mask(layer, "ip_adapter_mask")[0]
    assert mask.getpixel((3, 3)) == (255, 255, 255) and mask.getpixel((3, 20)) == mask.getpixel((20, 3)) == (0, 0, 0)
    for nothing, words in ((Image.new("L", (32, 32), 90), "no white"), (layer.crop((16, 0, 32, 32)), "transparent")):
        with pytest.raises(ConfigError, match=words):
            open_mask(nothing, "ip_adapter_mask")
