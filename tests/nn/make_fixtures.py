"""Writes fixtures/*.txt: name and shape of every tensor of diffusers' networks at full width.

Run once by hand: python tests/nn/make_fixtures.py
A line is "shape: names"; names that differ in nothing but one number are written once, with {0,1,2}.
"""

import re
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "fixtures"
CONFIGS = {
    "sd15": {"cross_attention_dim": 768},
    "inpaint": {"cross_attention_dim": 768, "in_channels": 9},
    "sd21": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "xl": {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "upcast_attention": None,
    },
}
SD3 = {"_class_name": "SD3Transformer2DModel", "num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192}
SD3 |= {"caption_projection_dim": 1536}
FLUX = {"_class_name": "FluxTransformer2DModel"}
TRANSFORMERS = {  # the settings of the published config.json that are not diffusers' defaults
    "sd3_medium": SD3,
    "sd35_medium": {**SD3, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13))},
    "sd35_large": {
        **SD3,
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "qk_norm": "rms_norm",
    },
    "flux_dev": {**FLUX, "guidance_embeds": True},
    "flux_schnell": FLUX,
}
CONTROLNETS = {  # likewise; every one has its base's settings but those of the way up
    f"controlnet_{kind}": {
        "_class_name": "ControlNetModel",
        **{key: value for key, value in CONFIGS[kind].items() if key != "up_block_types"},
    }
    for kind in ("sd15", "sd21", "xl")
}
T2I_ADAPTERS = {  # TencentARC's; sketch and canny for 1.5 see grey images
    "t2i_adapter_sd15": {"_class_name": "T2IAdapter", "in_channels": 1},
    "t2i_adapter_xl": {"_class_name": "T2IAdapter", "adapter_type": "full_adapter_xl", "downscale_factor": 16},
    "t2i_adapter_light": {"_class_name": "T2IAdapter", "adapter_type": "light_adapter", "channels": [320, 640, 1280]},
}
T2I_ADAPTERS["t2i_adapter_light"] |= {"num_res_blocks": 4}
UNIONS = {  # of the first six kinds, and of eight (promax)
    f"controlnet_union_xl{name}": {
        **CONTROLNETS["controlnet_xl"],
        "_class_name": "ControlNetUnionModel",
        "num_control_type": kinds,
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
    }
    for name, kinds in (("", 6), ("_promax", 8))
}
IP_ADAPTERS = {  # the U-Net that each goes with
    "ip_adapter_sd15": "sd15",
    "ip_adapter_plus_sd15": "sd15",
    "ip_adapter_full_sd15": "sd15",
    "ip_adapter_xl": "xl",
    "ip_adapter_plus_xl": "xl",
}


def resampler(width: int, out: int) -> dict[str, tuple[int, ...]]:
    """What image_proj of a "plus" adapter holds: 16 tokens, 4 layers, of a tower of width 1280."""
    block = {"0.norm1": (width,), "0.norm2": (width,), "1.0": (width,)}
    block = {f"{name}.{kind}": shape for name, shape in block.items() for kind in ("weight", "bias")}
    block |= {"0.to_q.weight": (width, width), "0.to_kv.weight": (2 * width, width), "0.to_out.weight": (width, width)}
    block |= {"1.1.weight": (4 * width, width), "1.3.weight": (width, 4 * width)}
    found = {"latents": (1, 16, width), "proj_in.weight": (width, 1280), "proj_in.bias": (width,)}
    found |= {
        "proj_out.weight": (out, width),
        "proj_out.bias": (out,),
        "norm_out.weight": (out,),
        "norm_out.bias": (out,),
    }
    return found | {f"layers.{i}.{name}": shape for i in range(4) for name, shape in block.items()}


def ip_adapter(kind: str) -> dict[str, tuple[int, ...]]:
    """The file's names and shapes: image_proj by hand, ip_adapter in the order of diffusers' attention processors."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(CONFIGS[IP_ADAPTERS[kind]])
    width, tower = (768, 1024) if IP_ADAPTERS[kind] == "sd15" else (2048, 1280)
    norm = {"norm.weight": (width,), "norm.bias": (width,)}
    shapes = {"proj.weight": (4 * width, tower), "proj.bias": (4 * width,), **norm}
    if "full" in kind:
        shapes = {"proj.0.weight": (1280, 1280), "proj.0.bias": (1280,), "proj.2.weight": (768, 1280)}
        shapes |= {"proj.2.bias": (768,), "proj.3.weight": (768,), "proj.3.bias": (768,)}
    elif "plus" in kind:
        shapes = resampler(768 if width == 768 else 1280, width)
    found = {f"image_proj.{name}": shape for name, shape in shapes.items()}
    for i, name in enumerate(unet.attn_processors):
        if ".attn2." in name:
            out = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            found |= {f"ip_adapter.{i}.{part}.weight": (out, width) for part in ("to_k_ip", "to_v_ip")}
    return found


def fold(names: list[str]) -> list[str]:
    """Joins names that differ in one number, from the last number to the first."""
    for position in range(4, -1, -1):
        groups: dict[str, list[str]] = {}
        for name in names:
            parts = re.split(r"(?<=\.)(\d+|\{[\d,]+\})(?=\.)", name)  # text, number, text, number, text ...
            at = 2 * position + 1
            number = parts[at] if at < len(parts) and parts[at].isdigit() else ""
            key = "".join([*parts[:at], "\0", *parts[at + 1 :]]) if number else name
            groups.setdefault(key, []).append(number)
        names = [
            key.replace("\0", numbers[0] if len(numbers) == 1 else "{" + ",".join(numbers) + "}")
            for key, numbers in groups.items()
        ]
    return names


def unfold(name: str) -> list[str]:
    """The names that `fold` joined."""
    braces = re.search(r"\{([\d,]+)\}", name)
    if not braces:
        return [name]
    return [n for i in braces[1].split(",") for n in unfold(name[: braces.start()] + i + name[braces.end() :])]


def file_of(kind: str) -> Path:
    prefix = "unet_" if kind in CONFIGS else "mmdit_" if kind in TRANSFORMERS else ""
    return FOLDER / f"{prefix}{kind}.txt"


def read(kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one fixture."""
    shapes = {}
    for line in file_of(kind).read_text().splitlines():
        shape, names = line.split(": ")
        for name in names.split():
            shapes.update(dict.fromkeys(unfold(name), tuple(int(n) for n in shape.split("x"))))
    return shapes


def main() -> None:
    import diffusers

    FOLDER.mkdir(exist_ok=True)
    for kind, config in {**CONFIGS, **TRANSFORMERS, **CONTROLNETS, **T2I_ADAPTERS, **UNIONS}.items():
        with torch.device("meta"):
            model = getattr(diffusers, config.get("_class_name", "UNet2DConditionModel"))
            state = model.from_config(config).state_dict()
        write(kind, {name: tuple(t.shape) for name, t in state.items()})
    for kind in IP_ADAPTERS:
        write(kind, ip_adapter(kind))


def write(kind: str, shapes: dict[str, tuple[int, ...]]) -> None:
    by_shape: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        by_shape.setdefault("x".join(map(str, shape)), []).append(name)
    file_of(kind).write_text("\n".join(f"{s}: {' '.join(fold(names))}" for s, names in by_shape.items()) + "\n")
    assert read(kind) == shapes, kind
    print(kind, len(shapes))


if __name__ == "__main__":
    main()
