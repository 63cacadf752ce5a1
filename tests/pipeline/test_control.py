"""ControlNets in pipelines: images equal diffusers', with negative controls; batches, edits, bad input."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from ldm.checkpoint.controlnet import ControlNetFile, save_controlnet
from ldm.cli import main
from ldm.control import edges
from ldm.errors import LdmError
from ldm.images import read_metadata, to_tensor
from ldm.nn.controlnet import ControlNet
from ldm.nn.unet import UNet
from ldm.pipeline import Pipeline
from ldm.pipeline.control import ControlNets
from ldm.render.drawing.runner import render
from tests.conftest import build_tiny_model

STEPS = {"num_inference_steps": 4, "sampler": "ddim", "guidance_scale": 3.0}
SIDE = 64


def loud(unet, seed=5, **settings):
    """A ControlNet of random weights that moves pixels."""
    torch.manual_seed(seed)
    net = ControlNet.from_unet(unet).eval()
    net = ControlNet(dataclasses.replace(net.control, **settings)).eval()
    for name, parameter in net.named_parameters():
        large = "controlnet_" in name and parameter.ndim > 1
        torch.nn.init.normal_(parameter, std=0.3 if large else 0.1)
    return net.requires_grad_(False)


def lora_file(path, seed=0):
    """Of attention in the tiny model's U-Net, in PEFT's layout, strong enough to move pixels."""
    torch.manual_seed(seed)
    blocks = [f"{block}.attentions.0.transformer_blocks.0" for block in ("down_blocks.0", "up_blocks.1")]
    names = [f"unet.{block}.attn2.{part}" for block in blocks for part in ("to_v", "to_out.0")]
    halves = (("A", (2, 32)), ("B", (32, 2)))
    state = {f"{name}.lora_{half}.weight": 2 * torch.randn(shape) for name in names for half, shape in halves}
    save_file(state, path)
    return path


def drawing(seed=0, side=SIDE):
    image = Image.new("RGB", (side, side), "white")
    points = np.random.default_rng(seed).integers(4, side - 4, 4).tolist()
    ImageDraw.Draw(image).line(points, fill="black", width=3)
    ImageDraw.Draw(image).ellipse((side // 4, side // 4, side // 2, side // 2), fill="red")
    return image


@pytest.fixture(scope="module")
def model():
    return build_tiny_model()


@pytest.fixture(scope="module")
def nets(model, tmp_path_factory):
    """Folders of two ControlNets for the tiny model, and of one that pools."""
    folder = tmp_path_factory.mktemp("nets")
    for name, settings in {"a": {}, "b": {}, "pooled": {"global_pool_conditions": True}}.items():
        save_controlnet(loud(model.unet, ord(name[0]), **settings), folder / name, torch.float32)
    return folder


def apart(one, other):
    """The largest difference of two images' pixels."""
    a, b = (np.asarray(image, np.int16) for image in (one, other))
    return int(np.abs(a - b).max())


# Against diffusers


@pytest.fixture(scope="module")
def peer_parts(tiny_folder):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    parts = dict(pipe.components)
    parts["scheduler"] = DDIMScheduler.from_pretrained(tiny_folder, subfolder="scheduler")
    return parts


def of_peer(kind, parts, nets, names, **call):
    import diffusers
    from diffusers import ControlNetModel

    found = [ControlNetModel.from_pretrained(nets / name) for name in names]
    pipe = getattr(diffusers, kind)(**parts, controlnet=found[0] if len(found) == 1 else found)
    pipe.set_progress_bar_config(disable=True)
    more = {"generator": torch.Generator().manual_seed(7), "num_inference_steps": 4, "guidance_scale": 3.0}
    return pipe("a red cat", negative_prompt="a dog", **more, **call).images[0]


CASES = {
    "one": (["a"], {}),
    "weight": (["a"], {"controlnet_conditioning_scale": 0.4}),
    "part": (["a"], {"control_guidance_start": 0.25, "control_guidance_end": 0.75}),
    "guess": (["a"], {"guess_mode": True}),
    "pooled": (["pooled"], {}),
    "two": (["a", "b"], {"controlnet_conditioning_scale": [0.7, 0.5], "control_guidance_end": [1.0, 0.5]}),
}


SIZE = {"height": SIDE, "width": SIDE}


def one_or_all(items):
    return items[0] if len(items) == 1 else items


@pytest.mark.parametrize("case", CASES)
def test_images_equal_diffusers(case, peer_parts, nets, tiny_folder):
    names, settings = CASES[case]
    images = [drawing(i) for i in range(len(names))]
    call = {"image": one_or_all(images), **settings, **SIZE}
    theirs = of_peer("StableDiffusionControlNetPipeline", peer_parts, nets, names, **call)
    pipe = Pipeline("a red cat", tiny_folder, negative_prompt="a dog", controlnet=[nets / name for name in names])
    call = {"seed": 7, **STEPS, **settings, **SIZE}
    assert apart(pipe.generate(control_image=images, **call)[0], theirs) <= 1
    assert apart(pipe.generate(control_image=[one.rotate(90) for one in images], **call)[0], theirs) > 5
    without = Pipeline("a red cat", tiny_folder, negative_prompt="a dog").generate(seed=7, **STEPS, **SIZE)[0]
    assert apart(without, theirs) > 5


def test_img2img_equals_diffusers(peer_parts, nets, tiny_folder):
    init, control = drawing(3), drawing(4)
    call = {"control_image": control, "strength": 0.75, "control_guidance_end": 0.7}
    vae = peer_parts["vae"]
    with torch.no_grad():  # their pipeline would sample from the VAE's distribution; we begin at its mean
        latents = vae.encode(to_tensor(init)).latent_dist.mode() * vae.config.scaling_factor
    theirs = of_peer("StableDiffusionControlNetImg2ImgPipeline", peer_parts, nets, ["a"], image=latents, **call)
    pipe = Pipeline("a red cat", tiny_folder, negative_prompt="a dog", controlnet=nets / "a")
    assert apart(pipe.generate(seed=7, image=init, **STEPS, **call)[0], theirs) <= 1
    assert apart(pipe.generate(seed=7, image=init, **STEPS, **{**call, "control_image": drawing(5)})[0], theirs) > 5
    assert apart(pipe.generate(seed=7, image=init, **STEPS, **{**call, "control_guidance_end": 1.0})[0], theirs) > 1


def test_with_a_lora_equals_diffusers(peer_parts, nets, tiny_folder, tmp_path):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    lora = lora_file(tmp_path / "lora.safetensors")
    parts = {**peer_parts, "unet": copy.deepcopy(peer_parts["unet"])}
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=ControlNetModel.from_pretrained(nets / "a"))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path, weight_name=lora.name)
    more = {"generator": torch.Generator().manual_seed(7), "num_inference_steps": 4, "guidance_scale": 3.0}
    more["controlnet_conditioning_scale"] = 0.01  # else nothing else shows
    theirs = pipe("a red cat", negative_prompt="a dog", image=drawing(), **more, **SIZE).images[0]
    call = {"seed": 7, "control_image": drawing(), "controlnet_conditioning_scale": 0.01, **STEPS, **SIZE}
    pipe = Pipeline("a red cat", tiny_folder, negative_prompt="a dog", controlnet=nets / "a", lora=lora)
    assert apart(pipe.generate(**call)[0], theirs) <= 1
    assert apart(pipe.generate(**{**call, "control_image": drawing(5)})[0], theirs) > 5
    pipe = Pipeline("a red cat", tiny_folder, negative_prompt="a dog", controlnet=nets / "a")
    assert apart(pipe.generate(**call)[0], theirs) > 5


# Our own promises


def test_the_same_bits_in_any_batch_and_a_list_for_each_prompt(model, nets):
    images = [drawing(i) for i in range(3)]
    pipe = Pipeline(["a cat", "a dog", "a red cat"], model, controlnet=[nets / "a"])
    together = pipe.generate(seed=3, control_image=images, batch_size=3, **STEPS)
    for prompt, image, drawn in zip(pipe.prompts, images, together):
        (alone,) = Pipeline(prompt, model, controlnet=nets / "a").generate(seed=3, control_image=image, **STEPS)
        assert alone.tobytes() == drawn.tobytes()
    assert apart(together[0], together[1]) > 5
    several = Pipeline(["a cat", "a dog"], model, controlnet=[nets / "a", nets / "b"])
    rows = several.generate(seed=3, control_image=[[images[0], images[1]], [images[1], images[2]]], **STEPS)
    alone = Pipeline("a dog", model, controlnet=[nets / "a", nets / "b"])
    assert alone.generate(seed=3, control_image=images[1:], **STEPS)[0].tobytes() == rows[1].tobytes()


@pytest.mark.parametrize(
    "guidance", [{}, {"guidance": "pag"}, {"guidance_interval": (0.3, 0.8)}, {"guidance_scale": 1.0}]
)
@pytest.mark.parametrize("guess_mode", [False, True])
def test_every_guidance_and_sampler_of_two_evaluations(model, nets, guidance, guess_mode):
    settings = {**STEPS, "sampler": "heun", "guess_mode": guess_mode, **guidance}
    pipe = Pipeline("a cat [a dog:0.5]", model, controlnet=nets / "a")
    two = pipe.generate(seed=[1, 2], num_images=2, control_image=drawing(), **settings)
    (one,) = pipe.generate(seed=2, control_image=drawing(), **settings)
    assert one.tobytes() == two[1].tobytes()
    assert apart(pipe.generate(seed=2, control_image=drawing(9), **settings)[0], one) > 5


def test_without_weight_or_part_nothing_is_changed(model, nets):
    pipe, plain = Pipeline("a cat", model, controlnet=nets / "a"), Pipeline("a cat", model)
    (before,) = plain.generate(seed=1, **STEPS)
    (still,) = pipe.generate(seed=1, control_image=drawing(), controlnet_conditioning_scale=0.0, **STEPS)
    assert before.tobytes() == still.tobytes()
    (last,) = pipe.generate(seed=1, control_image=drawing(), control_guidance_start=0.75, **STEPS)
    assert apart(before, last) > 0


def test_with_a_mask_and_an_inpainting_model_and_hires(model, nets):
    mask = Image.new("L", (SIDE, SIDE), 0)
    ImageDraw.Draw(mask).ellipse((10, 10, 50, 50), fill=255)
    torch.manual_seed(3)
    unet = UNet(dataclasses.replace(model.unet.config, in_channels=9)).eval().requires_grad_(False)
    keep = np.asarray(mask) == 0
    for base in (model, dataclasses.replace(model, unet=unet, name="inpainting")):
        pipe = Pipeline("a cat", base, controlnet=nets / "a")
        call = {"seed": 1, "image": drawing(1), "mask_image": mask, "strength": 1.0, **STEPS}
        one, other = (pipe.generate(control_image=drawing(i), **call)[0] for i in (4, 5))
        assert np.array_equal(np.asarray(one)[keep], np.asarray(drawing(1))[keep])
        assert apart(one, other) > 5
    pipe = Pipeline("a cat", model, controlnet=nets / "a")
    large = [pipe.generate(seed=1, hires_scale=2.0, control_image=drawing(i), **STEPS)[0] for i in (4, 5)]
    assert large[0].size == (64, 64) and apart(*large) > 5


def test_the_size_has_the_proportions_of_the_control_image(model, nets):
    pipe = Pipeline("a cat", model, controlnet=nets / "a")
    wide = drawing().resize((400, 100))
    assert pipe.generate(seed=1, control_image=wide, **STEPS)[0].size == (64, 16)
    assert pipe.generate(seed=1, control_image=wide, width=32, **STEPS)[0].size == (32, 8)
    assert pipe.generate(seed=1, control_image=wide, width=32, height=40, **STEPS)[0].size == (32, 40)


def test_metadata_and_conditions_that_are_made(model, nets, tmp_path):
    drawing().save(tmp_path / "photo.png")
    pipe = Pipeline("a cat", model, controlnet=str(nets / "a"))
    given = edges(drawing().resize((32, 32), Image.Resampling.LANCZOS))
    made = pipe.generate(seed=1, control_image=f"edges:{tmp_path / 'photo.png'}", guess_mode=True, **STEPS)
    same = pipe.generate(seed=1, control_image=given, guess_mode=True, **STEPS)
    assert made[0].tobytes() == same[0].tobytes()
    said = made.metadata[0]
    assert said["control_image"] == [f"edges:{(tmp_path / 'photo.png').resolve()}"] and said["guess_mode"] is True
    assert said["controlnet"][0]["path"] == str((nets / "a").resolve()) and len(said["controlnet"][0]["hash"]) == 64
    assert said["controlnet_conditioning_scale"] == (1.0,) and len(said["control_sha256"][0]) == 64
    assert "guess_mode" not in Pipeline("a cat", model).generate(seed=1, **STEPS).metadata[0]


def test_transparent_conditions_lie_on_black_and_flat_ones_are_told(model, nets, capsys):
    layer = Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 0))
    plain = Image.new("RGB", (SIDE, SIDE), "black")
    for image in (layer, plain):
        ImageDraw.Draw(image).line((8, 8, 50, 40), fill="white", width=3)
    pipe, call = Pipeline("a cat", model, controlnet=nets / "a"), {"seed": 1, "num_inference_steps": 1}
    assert (
        pipe.generate(control_image=layer, **call)[0].tobytes()
        == pipe.generate(control_image=plain, **call)[0].tobytes()
    )
    assert "one colour" not in capsys.readouterr().err
    pipe.generate(control_image=layer.crop((52, 0, 60, 8)), **call)
    assert "the control image (given) is of one colour: there is nothing to follow" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({}, "a ControlNet needs an image to look at"),
        ({"control_image": "nothing.png"}, "no such image"),
        ({"control_image": "edge:nothing.png"}, "'edge' is no kind of control that is made here"),
        ({"control_image": 7}, "expected an image or its file"),
        ({"control_image": [drawing()] * 2}, "2 of them for 1 prompts"),
        ({"control_image": drawing(), "controlnet_conditioning_scale": [1, 1]}, "2 numbers for 1 control images"),
        ({"control_image": drawing(), "controlnet_conditioning_scale": float("nan")}, "not a finite number"),
        (
            {"control_image": drawing(), "control_guidance_start": 0.5, "control_guidance_end": 0.5},
            "no part of the steps",
        ),
        ({"control_image": drawing(), "control_guidance_end": 1.5}, "no part of the steps"),
        ({"control_image": drawing(), "guess_mode": "yes"}, "expected True or False"),
        ({"control_image": drawing(), "control_guidance_ends": 0.5}, "did you mean"),
    ],
)
def test_bad_settings_are_one_line(model, nets, call, words):
    with pytest.raises(LdmError, match=words):
        Pipeline("a cat", model, controlnet=nets / "a").generate(**call)


def test_bad_controlnets_are_refused_when_the_pipeline_is_made(model, nets, tmp_path):
    for word in ("control_image", "controlnet_conditioning_scale", "control_guidance_start"):
        with pytest.raises(LdmError, match="needs a"):
            Pipeline("a cat", model).generate(**{word: 0.5})
    with pytest.raises(LdmError, match="has no control 'edges' of its own"):
        Pipeline("a cat", model, controlnet="edges")
    with pytest.raises(LdmError, match="no such ControlNet"):
        Pipeline("a cat", model, controlnet=tmp_path / "none")
    with pytest.raises(LdmError, match="controlnet belongs to Pipeline"):
        Pipeline("a cat", model).generate(controlnet=nets / "a")
    other = dataclasses.replace(model.unet.config, cross_attention_dim=48)
    save_controlnet(loud(UNet(other)), tmp_path / "other", torch.float32)
    with pytest.raises(LdmError, match="text of width 48, and the model tiny is text of width 32"):
        Pipeline("a cat", model, controlnet=tmp_path / "other")


def test_a_model_may_bring_controls_of_its_own(model, tiny_folder, nets, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(tiny_folder, folder)
    shutil.copytree(nets / "a", folder / "controlnets" / "edges")
    drawing().save(tmp_path / "photo.png")
    call = {"seed": 1, "control_image": f"edges:{tmp_path / 'photo.png'}", **STEPS}
    (own,) = Pipeline("a cat", folder, controlnet="edges").generate(**call)
    (named,) = Pipeline("a cat", tiny_folder, controlnet=nets / "a").generate(**call)
    assert own.tobytes() == named.tobytes()


# The command line, prompt files, replays


@pytest.fixture
def files(nets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawing().save("photo.png")
    drawing(8).save("other.png")
    return nets


def test_the_command_and_its_replay(files, tiny_folder, capsys):
    words = ["generate", "a cat", "--model", str(tiny_folder), "--steps", "4", "--seed", "1"]
    control = ["--controlnet", str(files / "a"), "--control", "edges:photo.png:0.8", "--control-guidance-end", "0.8"]
    assert main([*words, *control, "-o", "one.png"]) == 0
    assert main(["generate", "--from", "one.png", "--model", str(tiny_folder), "-o", "again.png"]) == 0
    assert main([*words, "-o", "plain.png"]) == 0
    one, again, plain = (Image.open(f"{name}.png") for name in ("one", "again", "plain"))
    assert one.tobytes() == again.tobytes() and apart(one, plain) > 5
    assert "will differ" not in capsys.readouterr().err
    said = read_metadata("one.png").ldm
    assert said["controlnet_conditioning_scale"] == [0.8] and said["control_guidance_end"] == [0.8]
    drawing(9).save("photo.png")
    assert main(["generate", "--from", "one.png", "--model", str(tiny_folder), "-o", "third.png"]) == 0
    assert "control_image is another image" in capsys.readouterr().err
    for wrong in (
        ["--control", "photo.png"],
        [*control, "--control-image", "photo.png"],
        ["--control", "edges:photo.png"],
    ):
        assert main([*words, *wrong]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_prompt_files_draw_the_same(files, tiny_folder):
    lines = [
        f"a cat --controlnet {files / 'a'} --control-image edges:photo.png --controlnet-conditioning-scale 0.8 --d 1",
        {"prompt": "a cat", "controlnet": [str(files / "a"), str(files / "b")], "seed": 2, "guess_mode": True}
        | {"control_image": ["photo.png", "edges:other.png"], "controlnet_conditioning_scale": [0.5, 1]},
        "a dog --d 3",
        f"a cat --controlnet {files / 'a'} --control-image other.png --d 4",
    ]
    Path("p.jsonl").write_text(
        "\n".join(json.dumps(one if isinstance(one, dict) else {"text": one}) for one in lines[1:2])
    )
    Path("p.txt").write_text("\n".join(one for one in lines if isinstance(one, str)))
    settings = {"model": str(tiny_folder), "num_inference_steps": 4}
    drawn = [*render("p.txt", "out", **settings).paths, *render("p.jsonl", "more", **settings).paths]
    assert len(drawn) == 4
    draw = {"num_inference_steps": 4}
    one = Pipeline("a cat", tiny_folder, controlnet=files / "a")
    two = Pipeline("a cat", tiny_folder, controlnet=[files / "a", files / "b"])
    expected = [
        one.generate(seed=1, control_image="edges:photo.png", controlnet_conditioning_scale=0.8, **draw),
        Pipeline("a dog", tiny_folder).generate(seed=3, **draw),
        one.generate(seed=4, control_image="other.png", **draw),
        two.generate(
            seed=2,
            control_image=["photo.png", "edges:other.png"],
            controlnet_conditioning_scale=[0.5, 1],
            guess_mode=True,
            **draw,
        ),
    ]
    for path, (image,) in zip(drawn, expected, strict=True):
        assert Image.open(path).tobytes() == image.tobytes(), path
    again = render(None, "again", sources=["out", "more"], model=str(tiny_folder)).paths
    assert sorted(Image.open(path).tobytes() for path in again) == sorted(Image.open(path).tobytes() for path in drawn)
    before = render("p.txt", "out", **settings).counts
    assert before["finished_before"] == 3 and before["rendered"] == 0
    drawing(9).save("other.png")  # another image is another job
    assert render("p.txt", "out", **settings).counts["rendered"] == 1


def test_broken_controlnets_fail_their_lines_alone_and_others_leave_memory(files, tiny_folder, monkeypatch):
    shutil.copytree(files / "a", "broken")
    weights = Path("broken/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")  # its sha256 is not the manifest's
    read, held = [], []
    load, load_file = ControlNets.load, ControlNetFile.load
    monkeypatch.setattr(ControlNets, "load", lambda nets, *where: held.append(nets) or load(nets, *where))
    monkeypatch.setattr(ControlNetFile, "load", lambda file, *where: read.append(file.name) or load_file(file, *where))
    nets = ["broken", str(files / "a"), str(files / "b"), "broken", str(files / "a"), None]
    lines = [
        {"prompt": "a cat", "seed": i, **({"controlnet": net, "control_image": "photo.png"} if net else {})}
        for i, net in enumerate(nets)
    ]
    found = render(lines, "out", model=str(tiny_folder), num_inference_steps=1, batch_size=1)
    assert found.counts["failed"] == 2 and found.counts["rendered"] == 4
    assert [Path(name).name for name in read] == ["broken", "a", "b"]  # each once
    assert not any(nets._loaded for nets in held)  # the last line had none


def test_a_replay_by_render_tells_of_other_networks(files, tiny_folder, model, capsys):
    net = shutil.copytree(files / "a", "net")
    lora = lora_file(Path("lora.safetensors"))
    line = {"prompt": "a cat", "seed": 1, "controlnet": str(net), "control_image": "photo.png", "lora": str(lora)}
    settings = {"model": str(tiny_folder), "num_inference_steps": 1}
    (drawn,) = render([line], "out", **settings).paths
    render(None, "same", sources=[drawn], model=str(tiny_folder))
    assert "will differ" not in capsys.readouterr().err
    shutil.rmtree(net)
    save_controlnet(loud(model.unet, 9), net, torch.float32)
    lora_file(lora, 1)
    render(None, "other", sources=[drawn], model=str(tiny_folder))
    said = capsys.readouterr().err
    assert "controlnet is another file than the one that was drawn with" in said and "LoRA lora" in said


def test_a_line_s_control_goes_with_the_controlnet_that_is_given(files, tiny_folder):
    settings = {"model": str(tiny_folder), "num_inference_steps": 1}
    line = "a cat --d 1 --control edges:photo.png:0.8"
    given = {"prompt": "a cat", "seed": 1, "controlnet": str(files / "a"), "control_image": "edges:photo.png"}
    (expected,) = render([{**given, "controlnet_conditioning_scale": 0.8}], "out", **settings).paths
    (own,) = render([f"{line} --controlnet {files / 'a'}"], "own", **settings).paths
    (shared,) = render([line], "shared", controlnet=str(files / "a"), **settings).paths
    assert Path(own).read_bytes() and len({Image.open(path).tobytes() for path in (expected, own, shared)}) == 1
    assert render([line], "none", **settings).counts["bad_lines"] == 1  # the model has no control of its own


def test_render_keeps_conditions_on_request(files, tiny_folder):
    net, folder = str(files / "a"), Path("out")
    lines = [
        {
            "prompt": "a cat",
            "name": "one",
            "controlnet": net,
            "control_image": "edges:photo.png",
            "width": 32,
            "height": 64,
        },
        {"prompt": "a cat", "name": "two", "controlnet": [net, net], "control_image": ["photo.png", "blur:other.png"]},
        {"prompt": "a dog", "name": "plain"},
    ]
    settings = {"model": str(tiny_folder), "num_inference_steps": 1, "keep_conditions": True}
    render(lines, folder, **{**settings, "keep_conditions": False})
    assert not (folder / "conditions").exists()
    assert render(lines, folder, **settings).counts["rendered"] == 0
    kept = sorted(path.relative_to(folder).as_posix() for path in folder.glob("conditions*/*"))
    assert kept == ["conditions-2/two.png", "conditions/one.png", "conditions/two.png"]
    made = edges(drawing().resize((32, 64), Image.Resampling.LANCZOS))
    assert Image.open(folder / "conditions" / "one.png").tobytes() == made.tobytes()
    assert Image.open(folder / "conditions-2" / "two.png").size == Image.open(folder / "two.png").size
