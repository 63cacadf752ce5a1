"""IP-Adapter, T2I-Adapter and ControlNet Union with XL: images equal diffusers', with negative controls."""

import inspect

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.cli import main
from ldm.errors import ConfigError, ModelError
from ldm.images import read_metadata
from ldm.nn.controlnet_union import ControlNetUnion, ControlNetUnionConfig
from ldm.nn.unet import UNet
from ldm.pipeline import Pipeline
from ldm.render.drawing.runner import render
from tests.checkpoint.test_families_folders import build, networks
from tests.nn.test_unet import FIXTURES
from tests.pipeline.test_control import apart, drawing
from tests.pipeline.test_ip_adapter import TOWER, adapter_file, photo
from tests.pipeline.test_t2i_adapter import loud_adapter

SIZE = {"height": 64, "width": 64}
CALL = {"num_inference_steps": 4, "guidance_scale": 3.0, **SIZE}
PROMPT, NEGATIVE = "a red cat", "a dog"
LEVELS = {"block_out_channels": (32, 64, 64), "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2}
LEVELS |= {"up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), "transformer_layers_per_block": [1, 1, 2]}
LEVELS |= {"attention_head_dim": [2, 4, 4]}
XL = {"cross_attention_dim": 80, "use_linear_projection": True, "addition_embed_type": "text_time"}
XL |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 24}


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """diffusers' pipeline of a small XL with three levels, and its folder."""
    pipe, folder = build("xl"), tmp_path_factory.mktemp("xl")
    pipe.register_modules(unet=networks(**LEVELS, **XL)[0])
    pipe.save_pretrained(folder / "model")
    return pipe, folder


def of_peer(kind, pipe, **more):
    import diffusers

    parts = {name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    found = getattr(diffusers, kind)(**parts, **more)
    found.set_progress_bar_config(disable=True)
    return lambda **call: found(
        PROMPT, negative_prompt=NEGATIVE, generator=torch.Generator().manual_seed(7), **{**CALL, **call}
    ).images[0]


def test_ip_adapter_equals_diffusers(peer):
    import diffusers
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    _, folder = peer
    unet = UNet(Pipeline(PROMPT, folder / "model")._engine.info.unet)
    adapter_file(unet, folder / "plus.safetensors", "plus")
    torch.manual_seed(9)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**TOWER)).save_pretrained(folder / "image_encoder")
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(folder / "model", add_watermarker=False)
    theirs.load_ip_adapter(str(folder), subfolder="", weight_name="plus.safetensors", low_cpu_mem_usage=False)
    theirs.set_ip_adapter_scale(scale := {"down": {"block_2": [0.5]}, "up": 1.0})
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    expected = theirs(PROMPT, negative_prompt=NEGATIVE, generator=generator, ip_adapter_image=photo(0), **CALL).images[
        0
    ]
    ours = Pipeline(PROMPT, folder / "model", negative_prompt=NEGATIVE, ip_adapter=folder / "plus.safetensors")
    call = {"seed": 7, "sampler": "euler", "ip_adapter_scale": scale, **CALL}
    assert apart(ours.generate(ip_adapter_image=photo(0), **call)[0], expected) <= 1
    assert apart(ours.generate(ip_adapter_image=photo(1), **call)[0], expected) > 5
    assert apart(ours.generate(ip_adapter_image=photo(0), **{**call, "ip_adapter_scale": 1.0})[0], expected) > 5


def test_t2i_adapter_equals_diffusers(peer):
    pipe, folder = peer
    adapter = loud_adapter(adapter_type="full_adapter_xl", channels=[32, 64, 64, 64], downscale_factor=8)
    adapter.save_pretrained(folder / "t2i")  # its last feature goes to the middle
    draw = of_peer("StableDiffusionXLAdapterPipeline", pipe, adapter=adapter)
    expected = draw(image=drawing(), adapter_conditioning_scale=0.7, adapter_conditioning_factor=0.75)
    ours = Pipeline(PROMPT, folder / "model", negative_prompt=NEGATIVE, controlnet=folder / "t2i")
    call = {"seed": 7, "sampler": "euler", "adapter_conditioning_scale": 0.7, **CALL}
    call["adapter_conditioning_factor"] = 0.75
    assert apart(ours.generate(control_image=drawing(), **call)[0], expected) <= 1
    assert apart(ours.generate(control_image=drawing(5), **call)[0], expected) > 5
    assert (
        apart(ours.generate(control_image=drawing(), **{**call, "adapter_conditioning_factor": 1.0})[0], expected) > 1
    )
    with pytest.raises(ConfigError, match=r"60 is not a multiple of 8.*56 or 64"):
        ours.generate(control_image=drawing(), **{**call, "height": 60})
    free = {name: value for name, value in call.items() if name not in SIZE}
    wide = ours.generate(control_image=drawing().resize((60, 100)), **free)[0]  # not by the model's steps of 4
    assert wide.size[0] % 8 == wide.size[1] % 8 == 0 and wide.size != (64, 64)


LOUD = {"cond_embedding": 2.5, "task_embedding": 10, "spatial_ch_projs": 6, "control_add_embedding": 8}


def union(unet, kinds=6, louder=()):
    from diffusers import ControlNetUnionModel

    settings = {
        key: unet.config[key] for key in inspect.signature(ControlNetUnionModel).parameters if key in unet.config
    }
    settings |= {"num_control_type": kinds, "num_trans_channel": 32, "num_trans_head": 4, "num_proj_channel": 32}
    torch.manual_seed(3)
    net = ControlNetUnionModel(**settings, conditioning_embedding_out_channels=(8, 8, 16)).eval()
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1 and "down_blocks.0.res" not in name:
            torch.nn.init.normal_(parameter, std=0.15 * next((LOUD[one] for one in louder if one in name), 1))
    return net


def test_controlnet_union_equals_diffusers(peer):
    pipe, folder = peer
    net = union(pipe.unet)
    net.save_pretrained(folder / "union")
    draw = of_peer("StableDiffusionXLControlNetUnionPipeline", pipe, controlnet=net, add_watermarker=False)
    expected = draw(control_image=[drawing()], control_mode=[3], controlnet_conditioning_scale=0.5)
    ours = Pipeline(PROMPT, folder / "model", negative_prompt=NEGATIVE, controlnet=folder / "union")
    call = {"seed": 7, "sampler": "euler", "control_image": drawing(), "controlnet_conditioning_scale": 0.5, **CALL}
    mine = ours.generate(control_mode=3, **call)
    assert apart(mine[0], expected) <= 1
    assert apart(ours.generate(control_mode=2, **call)[0], expected) > 5
    assert apart(ours.generate(control_mode=3, **{**call, "control_image": drawing(5)})[0], expected) > 5
    assert mine.metadata[0]["control_mode"] == (3,)
    three = ours.generate(num_images=3, control_mode=3, **call)
    assert three[0].tobytes() == mine[0].tobytes()
    two = Pipeline(PROMPT, folder / "model", negative_prompt=NEGATIVE, controlnet=[folder / "union"] * 2)
    both = two.generate(control_mode=[3, 1], **{**call, "control_image": [drawing(), drawing(1)]})[0]
    assert apart(both, expected) > 5
    for mode in (None, 6, []):
        with pytest.raises(ConfigError, match="control_mode"):
            ours.generate(control_mode=mode, **call)


MIXED = {  # diffusers' words; with a part that ends, one kind acts alone from then on
    "two": {"control_mode": [3, 1]},
    "weights": {"control_mode": [3, 1], "controlnet_conditioning_scale": [0.5, 0.8]},
    "part": {"control_mode": [3, 1], "control_guidance_start": [0.0, 0.5], "control_guidance_end": [1.0, 1.0]},
    "guess": {"control_mode": [2, 5], "guess_mode": True, "guidance_scale": 1.0},  # with guidance theirs fails
    "three": {"control_mode": [0, 4, 3], "controlnet_conditioning_scale": 0.6},
}


@pytest.fixture(scope="module")
def mixing(peer):
    pipe, folder = peer
    net = union(pipe.unet, louder=LOUD)
    net.save_pretrained(folder / "kinds")
    ours = Pipeline(PROMPT, folder / "model", negative_prompt=NEGATIVE, controlnet=folder / "kinds")
    return of_peer("StableDiffusionXLControlNetUnionPipeline", pipe, controlnet=net, add_watermarker=False), ours


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in ("two", "three") else case for case in MIXED]
)
def test_several_kinds_in_one_union_equal_diffusers(mixing, case):
    theirs, ours = mixing
    settings = MIXED[case]
    images = [drawing(i) for i in range(len(settings["control_mode"]))]
    expected = theirs(control_image=list(images), **settings)
    call = {"seed": 7, "sampler": "euler", **CALL, **settings}
    mine = ours.generate(control_image=images, **call)
    assert apart(mine[0], expected) <= 1
    assert mine.metadata[0]["control_mode"] == tuple(settings["control_mode"])
    assert apart(ours.generate(control_image=[*images[:-1], drawing(9)], **call)[0], expected) > 5
    other = [(mode + 2) % 6 for mode in settings["control_mode"]]
    assert apart(ours.generate(control_image=images, **{**call, "control_mode": other})[0], expected) > 2


def test_mixed_kinds_in_batches_and_beside_other_networks(mixing, peer, model_of_xl_net):
    _, ours = mixing
    folder, images = peer[1], [drawing(i) for i in range(4)]
    call = {"sampler": "euler", **CALL, "controlnet_conditioning_scale": [0.5, 0.8]}
    alone = ours.generate(seed=8, control_image=images[:2], control_mode=[3, 1], **call)[0]
    three = ours.generate(seed=7, num_images=3, control_image=images[:2], control_mode=[3, 1], **call)
    assert three[1].tobytes() == alone.tobytes()
    pipe = Pipeline([PROMPT, "a dog"], folder / "model", negative_prompt=NEGATIVE, controlnet=folder / "kinds")
    both = pipe.generate(seed=8, control_image=[images[:2], images[2:]], control_mode=[3, 1], **call)
    assert both[0].tobytes() == alone.tobytes() and apart(both[0], both[1]) > 5
    plain = Pipeline(PROMPT, folder / "model", negative_prompt=NEGATIVE).generate(seed=8, sampler="euler", **CALL)[0]
    off = {**call, "controlnet_conditioning_scale": 0.0}
    still = ours.generate(seed=8, control_image=images[:2], control_mode=[3, 1], **off)[0]
    assert still.tobytes() == plain.tobytes()  # where no kind acts the network does nothing
    nets = [folder / "kinds", model_of_xl_net]
    beside = Pipeline(PROMPT, folder / "model", negative_prompt=NEGATIVE, controlnet=nets)
    call["controlnet_conditioning_scale"] = [0.5, 0.8, 0.0]
    still = beside.generate(seed=8, control_image=[images[:2], images[2]], control_mode=[[3, 1], None], **call)
    assert still[0].tobytes() == alone.tobytes()
    assert still.metadata[0]["control_mode"] == ((3, 1), None)
    flat = beside.generate(seed=8, control_image=images[:3], control_mode=[[3, 1], None], **call)
    assert flat[0].tobytes() == alone.tobytes()
    call["controlnet_conditioning_scale"] = [0.5, 0.8, 1.0]
    assert apart(beside.generate(seed=8, control_image=images[:3], control_mode=[[3, 1], None], **call)[0], alone) > 5


@pytest.fixture(scope="module")
def model_of_xl_net(peer):
    from diffusers import ControlNetModel

    torch.manual_seed(4)
    net = ControlNetModel.from_unet(peer[0].unet, conditioning_embedding_out_channels=(8, 8, 16))
    for name, parameter in net.named_parameters():
        if "controlnet_" in name and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    net.save_pretrained(peer[1] / "net")
    return peer[1] / "net"


def test_mixed_kinds_by_command_prompt_files_and_replay(mixing, peer, tmp_path, monkeypatch):
    _, ours = mixing
    monkeypatch.chdir(tmp_path)
    drawing().save("a.png")
    drawing(1).save("b.png")
    model, union = str(peer[1] / "model"), str(peer[1] / "kinds")
    words = ["generate", PROMPT, "--model", model, "--negative-prompt", NEGATIVE, "--controlnet", union]
    words += ["--steps", "2", "--seed", "7", "--sampler", "euler", "--width", "64", "--height", "64"]
    shown = ["--control", "edges:a.png:0.5", "--control", "segmentation:b.png"]
    assert main([*words, *shown, "-o", "one.png"]) == 0
    said = read_metadata("one.png").ldm
    assert said["control_mode"] == [3, 5] and said["controlnet_conditioning_scale"] == [0.5, 1]
    assert main(["generate", "--from", "one.png", "--model", model, "-o", "again.png"]) == 0
    given = ["--control-image", "edges:a.png", "--control-image", "segmentation:b.png", "--control-mode", "3+5"]
    assert main([*words, *given, "--controlnet-conditioning-scale", "0.5,1", "-o", "given.png"]) == 0
    drawn = {"model": model, "sampler": "euler", "width": 64, "height": 64, "num_inference_steps": 2}
    line = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "seed": 7, "controlnet": union}
    more = {"control_image": ["edges:a.png", "segmentation:b.png"], "controlnet_conditioning_scale": [0.5, 1]}
    text = f"{PROMPT} --seed 7 --negative-prompt '{NEGATIVE}' --control edges:a.png:0.5 --control segmentation:b.png"
    lines = [{**line, **more}, {**line, **more, "control_mode": "3,5"}, f"{text} --controlnet {union}"]
    files = ["again.png", "given.png", *render(lines, "out", **drawn).paths]
    files += render([text], "default", controlnet=union, **drawn).paths  # the command's ControlNet, the line's images
    again = render(None, "more", sources=["out"], model=model).paths
    one = Image.open("one.png").tobytes()
    assert all(Image.open(path).tobytes() == one for path in [*files, *again]) and len(files) == 6 and len(again) == 3
    plain = ours.generate(seed=7, control_image="edges:a.png", **{**CALL, "num_inference_steps": 2})
    assert plain.metadata[0]["control_mode"] == (3,)  # told by the image


def test_mistakes_with_kinds_are_one_line(mixing, model_of_xl_net, peer, capsys):
    _, ours = mixing
    images = [drawing(), drawing(1)]
    plain = Pipeline(PROMPT, peer[1] / "model", controlnet=model_of_xl_net)
    for pipe, call, words in (
        (ours, {"control_image": images}, "kinds knows 6 kinds of condition: give one from 0 to 5 for each"),
        (ours, {"control_image": images, "control_mode": [3, 6]}, "give one from 0 to 5 for each of its images"),
        (ours, {"control_image": images, "control_mode": [3, None]}, "give one from 0 to 5"),
        (ours, {"control_image": images, "control_mode": [3, 1, 2]}, "2 images for 3 kinds of condition"),
        (ours, {"control_image": images[0], "control_mode": [3, 1]}, "one image for 2 kinds of condition"),
        (ours, {"control_image": images, "control_mode": [3, "edges"]}, "control_mode"),
        (
            ours,
            {"control_image": images, "control_mode": [3, 1], "control_guidance_end": [1, 1, 1]},
            "2 control images",
        ),
        (plain, {"control_image": images, "control_mode": [3, 1]}, "net is no ControlNet Union and has no kinds"),
        (plain, {"control_image": images, "control_mode": [None, None]}, "2 images for net, which is no ControlNet Un"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            pipe.generate(**CALL, **call)
        assert "\n" not in str(caught.value)
    words = ["generate", "a", "--model", str(peer[1] / "model"), "--controlnet", str(peer[1] / "kinds")]
    assert main([*words, "--control-image", "a.png", "--control-mode", "3+x"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("kind", FIXTURES.UNIONS)
def test_names_and_shapes_of_a_union_at_full_width(kind):
    config = ControlNetUnionConfig.from_diffusers(FIXTURES.UNIONS[kind])
    with torch.device("meta"):
        state = ControlNetUnion(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == FIXTURES.read(kind)


def test_a_union_as_a_single_file(mixing, peer, tmp_path):
    _, ours = mixing
    file = tmp_path / "promax.safetensors"
    state = load_file(peer[1] / "kinds" / "diffusion_pytorch_model.safetensors")
    save_file(state, file)
    call = {"seed": 7, "control_image": [drawing(), drawing(1)], "control_mode": [3, 1], **CALL}
    mine = Pipeline(PROMPT, peer[1] / "model", negative_prompt=NEGATIVE, controlnet=file).generate(**call)[0]
    assert mine.tobytes() == ours.generate(**call)[0].tobytes()
    state.pop("spatial_ch_projs.bias")
    save_file(state, file)
    with pytest.raises(ModelError, match=r"1 missing \(spatial_ch_projs.bias\)"):
        Pipeline(PROMPT, peer[1] / "model", controlnet=file)


def test_a_union_of_another_family_or_damaged_is_one_line(mixing, peer, tmp_path):
    from tests.conftest import build_tiny_model

    net = union(peer[0].unet)
    net.save_pretrained(tmp_path / "union")
    with pytest.raises(ModelError, match="text of width 80, and the model tiny is text of width 32"):
        Pipeline("a cat", build_tiny_model(), controlnet=tmp_path / "union" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelError, match="text of width 80, and the model tiny is text of width 32") as caught:
        Pipeline("a cat", build_tiny_model(), controlnet=tmp_path / "union")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="have to be 48"):
        ControlNetUnionConfig.from_diffusers(
            {**dict(net.config), "block_out_channels": (48, 64, 64), "norm_num_groups": 8}
        )
