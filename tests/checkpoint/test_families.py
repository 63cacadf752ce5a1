"""The families at full width, on the meta device: every tensor has its place, under the names of published files."""

import pytest
import torch

from ldm.checkpoint.families import FAMILIES, SD1, SD2, XL, family_of
from ldm.checkpoint.single.names import destination_of, originals, parts_of
from ldm.errors import ModelError
from ldm.nn.unet_config import UNetConfig

# Names and shapes as they stand in v1-5-pruned, v2-1_768 and sd_xl_base_1.0.
IN_ALL = """
model.diffusion_model.time_embed.0.weight 1280 320
model.diffusion_model.time_embed.2.bias 1280
model.diffusion_model.input_blocks.1.0.in_layers.0.weight 320
model.diffusion_model.input_blocks.1.0.in_layers.2.weight 320 320 3 3
model.diffusion_model.input_blocks.2.0.emb_layers.1.weight 320 1280
model.diffusion_model.input_blocks.3.0.op.weight 320 320 3 3
model.diffusion_model.input_blocks.4.0.skip_connection.weight 640 320 1 1
model.diffusion_model.input_blocks.6.0.op.bias 640
model.diffusion_model.middle_block.0.out_layers.0.weight 1280
model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight 10240 1280
model.diffusion_model.middle_block.2.out_layers.3.weight 1280 1280 3 3
model.diffusion_model.output_blocks.0.0.in_layers.2.weight 1280 2560 3 3
model.diffusion_model.output_blocks.5.2.conv.weight WIDE WIDE 3 3
model.diffusion_model.out.0.weight 320
model.diffusion_model.out.2.weight 4 320 3 3
first_stage_model.encoder.conv_in.weight 128 3 3 3
first_stage_model.encoder.down.1.block.0.nin_shortcut.weight 256 128 1 1
first_stage_model.encoder.down.2.downsample.conv.weight 512 512 3 3
first_stage_model.encoder.down.3.block.1.conv2.bias 512
first_stage_model.encoder.mid.attn_1.q.weight 512 512 1 1
first_stage_model.encoder.mid.attn_1.proj_out.weight 512 512 1 1
first_stage_model.encoder.mid.attn_1.norm.bias 512
first_stage_model.encoder.norm_out.weight 512
first_stage_model.encoder.conv_out.weight 8 512 3 3
first_stage_model.quant_conv.weight 8 8 1 1
first_stage_model.post_quant_conv.bias 4
first_stage_model.decoder.conv_in.weight 512 4 3 3
first_stage_model.decoder.mid.block_1.norm1.weight 512
first_stage_model.decoder.mid.block_2.conv1.weight 512 512 3 3
first_stage_model.decoder.up.3.block.2.conv1.weight 512 512 3 3
first_stage_model.decoder.up.3.upsample.conv.weight 512 512 3 3
first_stage_model.decoder.up.1.block.0.nin_shortcut.weight 256 512 1 1
first_stage_model.decoder.up.0.block.0.nin_shortcut.weight 128 256 1 1
first_stage_model.decoder.norm_out.weight 128
first_stage_model.decoder.conv_out.weight 3 128 3 3
"""
U_NET_1_AND_2 = """
model.diffusion_model.input_blocks.9.0.op.weight 1280 1280 3 3
model.diffusion_model.input_blocks.11.0.out_layers.3.bias 1280
model.diffusion_model.output_blocks.2.1.conv.weight 1280 1280 3 3
model.diffusion_model.output_blocks.8.2.conv.weight 640 640 3 3
model.diffusion_model.output_blocks.11.0.skip_connection.weight 320 640 1 1
"""
OWN = {
    "sd1": """
model.diffusion_model.input_blocks.0.0.weight 320 4 3 3
model.diffusion_model.input_blocks.1.1.norm.weight 320
model.diffusion_model.input_blocks.1.1.proj_in.weight 320 320 1 1
model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight 320 768
model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn1.to_out.0.bias 320
cond_stage_model.transformer.text_model.embeddings.position_embedding.weight 77 768
cond_stage_model.transformer.text_model.embeddings.token_embedding.weight 49408 768
cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight 768 768
cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight 3072 768
cond_stage_model.transformer.text_model.final_layer_norm.bias 768
"""
    + U_NET_1_AND_2.replace("WIDE", "1280"),
    "sd2": """
model.diffusion_model.input_blocks.0.0.weight 320 4 3 3
model.diffusion_model.input_blocks.1.1.proj_in.weight 320 320
model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight 320 1024
cond_stage_model.model.positional_embedding 77 1024
cond_stage_model.model.token_embedding.weight 49408 1024
cond_stage_model.model.transformer.resblocks.0.ln_1.weight 1024
cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight 3072 1024
cond_stage_model.model.transformer.resblocks.22.attn.in_proj_bias 3072
cond_stage_model.model.transformer.resblocks.22.attn.out_proj.weight 1024 1024
cond_stage_model.model.transformer.resblocks.3.mlp.c_fc.weight 4096 1024
cond_stage_model.model.transformer.resblocks.3.mlp.c_proj.bias 1024
cond_stage_model.model.ln_final.weight 1024
"""
    + U_NET_1_AND_2,
    "xl": """
model.diffusion_model.input_blocks.0.0.weight 320 4 3 3
model.diffusion_model.label_emb.0.0.weight 1280 2816
model.diffusion_model.label_emb.0.2.weight 1280 1280
model.diffusion_model.input_blocks.4.1.proj_in.weight 640 640
model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight 640 2048
model.diffusion_model.input_blocks.8.1.transformer_blocks.9.norm3.bias 1280
model.diffusion_model.middle_block.1.transformer_blocks.9.attn1.to_q.weight 1280 1280
model.diffusion_model.output_blocks.2.2.conv.weight 1280 1280 3 3
model.diffusion_model.output_blocks.8.0.skip_connection.weight 320 640 1 1
conditioner.embedders.0.transformer.text_model.encoder.layers.11.layer_norm2.weight 768
conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight 49408 768
conditioner.embedders.1.model.positional_embedding 77 1280
conditioner.embedders.1.model.text_projection 1280 1280
conditioner.embedders.1.model.token_embedding.weight 49408 1280
conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight 3840 1280
conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_proj.weight 1280 5120
conditioner.embedders.1.model.ln_final.bias 1280
""",
}
COUNTS = {  # tensors in a folder: U-Net, autoencoder, text encoders; and in a single file
    "sd1": (686, 248, 196, 686 + 248 + 196),
    "sd2": (686, 248, 372, 686 + 248 + 280),
    "xl": (1680, 248, 196, 517, 1680 + 248 + 196 + 389),
}


def shapes(family):
    """Component -> {name in its folder: shape}, of models on the meta device."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from ldm.checkpoint.save import PREFIX
    from ldm.nn.unet import UNet

    with torch.device("meta"):
        modules = {"unet": UNet(UNetConfig.from_diffusers(family.unet)), "vae": AutoencoderKL.from_config(family.vae)}
        for name, config in family.text.items():
            kind = CLIPTextModelWithProjection if "With" in config["architectures"][0] else CLIPTextModel
            modules[name] = kind(CLIPTextConfig.from_dict(dict(config)))
    found = {part: {n: tuple(t.shape) for n, t in module.state_dict().items()} for part, module in modules.items()}
    for part in family.text:
        found[part] = {(n if n.startswith("text_") else PREFIX + n): shape for n, shape in found[part].items()}
    return found


def listed(family):
    """The literal names and shapes of a family."""
    text = (IN_ALL + OWN[family.name]).replace("WIDE", "640" if family is XL else "1280")
    return {name: tuple(map(int, shape)) for name, *shape in map(str.split, filter(None, text.splitlines()))}


@pytest.mark.parametrize("family", [SD1, SD2, XL], ids=lambda family: family.name)
def test_every_tensor_finds_its_place(family):
    of_folder, parts = shapes(family), parts_of(family.configs("epsilon"))
    assert tuple(len(names) for names in of_folder.values()) == COUNTS[family.name][:-1]
    file = {}
    for part, names in of_folder.items():
        for key, found in originals(parts[part], names):
            assert found is not None and found == destination_of(parts[part], key)
            assert not any(destination_of(other, key) for other in parts.values() if other.name != part)
            first = names[found.names[0]]
            shape = {"flat": (*first, 1, 1), "transposed": first[::-1]}.get(found.change, first)
            file[key] = (len(found.names) * shape[0], *shape[1:])
        assert sorted(n for key, p in originals(parts[part], names) for n in p.names) == sorted(names)
    assert len(file) == COUNTS[family.name][-1]
    assert {name: file.get(name) for name in listed(family)} == listed(family)
    assert family_of(file) is family and family_of(of_folder["unet"]) is family


@pytest.mark.parametrize("name", [name for name in FAMILIES if "inpainting" in name])
def test_inpainting_differs_in_the_first_layer_alone(name):
    family, base = FAMILIES[name], FAMILIES[name.removesuffix("-inpainting")]
    theirs, ours = shapes(base)["unet"], shapes(family)["unet"]
    assert {n for n in ours if ours[n] != theirs[n]} == {"conv_in.weight"} and len(ours) == len(theirs)
    assert ours["conv_in.weight"] == (320, 9, 3, 3) and family.inpainting and not base.inpainting
    assert family_of(ours) is family and family_of({f"unet.{n}": shape for n, shape in ours.items()}) is family


@pytest.mark.parametrize(
    "shapes, said",
    [
        ({"a": (1,)}, "holds no U-Net"),
        ({"lora_unet_down.lora_down.weight": (4, 320)}, "is a LoRA"),
        ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.norm": (1,)}, "FLUX"),
        ({"conv_in.weight": (384, 4, 3, 3), "x.attn2.to_k.weight": (8, 1280)}, "the XL refiner"),
        ({"conv_in.weight": (320, 5, 3, 3), "x.attn2.to_k.weight": (8, 1024)}, "a depth model"),
        ({"conv_in.weight": (320, 6, 3, 3), "x.attn2.to_k.weight": (8, 768)}, "no known family"),
        ({"conv_in.weight": (64, 4, 3, 3), "x.attn2.to_k.weight": (8, 768)}, "no known family"),
    ],
)
def test_what_is_none_of_these_is_named(shapes, said):
    with pytest.raises(ModelError, match=said):
        family_of(shapes, "f.safetensors")


def test_settings_follow_the_prediction_type():
    base, v = SD2.configs("epsilon"), SD2.configs("v_prediction", zero_snr=True)
    assert (base["unet"]["sample_size"], v["unet"]["sample_size"], XL.configs("epsilon")["unet"]["sample_size"]) == (
        *(64, 96),
        128,
    )
    assert v["scheduler"]["rescale_betas_zero_snr"] and v["scheduler"]["timestep_spacing"] == "trailing"
    assert base["scheduler"]["timestep_spacing"] == "leading" and SD2.prediction_type is None
    assert SD1.vae["scaling_factor"] == SD2.vae["scaling_factor"] == 0.18215 and XL.vae["scaling_factor"] == 0.13025
