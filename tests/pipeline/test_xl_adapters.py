"""IP-Adapter, T2I-Adapter and ControlNet Union with XL: images equal diffusers', with negative controls."""

import inspect

import pytest
import torch

from ldm.errors import ConfigError, ModelError
from ldm.nn.controlnet_union import ControlNetUnion, ControlNetUnionConfig
from ldm.nn.unet import UNet
from ldm.pipeline import Pipeline
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
        PROMPT, negative_prompt=NEGATIVE, generator=torch.Generator().manual_seed(7), **CALL, **call
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
    with pytest.raises(ConfigError, match="t2i needs multiples of 8, not 64x60"):
        ours.generate(control_image=drawing(), **{**call, "height": 60})


def union(unet, kinds=6):
    from diffusers import ControlNetUnionModel

    settings = {
        key: unet.config[key] for key in inspect.signature(ControlNetUnionModel).parameters if key in unet.config
    }
    settings |= {"num_control_type": kinds, "num_trans_channel": 32, "num_trans_head": 4, "num_proj_channel": 32}
    torch.manual_seed(3)
    net = ControlNetUnionModel(**settings, conditioning_embedding_out_channels=(8, 8, 16)).eval()
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1 and "down_blocks.0.res" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
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
    for mode in (None, 6, [1, 2]):
        with pytest.raises(ConfigError, match="control_mode"):
            ours.generate(control_mode=mode, **call)


@pytest.mark.parametrize("kind", FIXTURES.UNIONS)
def test_names_and_shapes_of_a_union_at_full_width(kind):
    config = ControlNetUnionConfig.from_diffusers(FIXTURES.UNIONS[kind])
    with torch.device("meta"):
        state = ControlNetUnion(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == FIXTURES.read(kind)


def test_a_union_of_another_family_or_damaged_is_one_line(peer, tmp_path):
    from tests.conftest import build_tiny_model

    net = union(peer[0].unet)
    net.save_pretrained(tmp_path / "union")
    with pytest.raises(ModelError, match="text of width 80, and the model tiny is text of width 32") as caught:
        Pipeline("a cat", build_tiny_model(), controlnet=tmp_path / "union")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="have to be 48"):
        ControlNetUnionConfig.from_diffusers(
            {**dict(net.config), "block_out_channels": (48, 64, 64), "norm_num_groups": 8}
        )
