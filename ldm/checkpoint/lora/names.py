"""The names of layers in LoRA files: what a key means, and every way to spell a layer of a model.

Spellings are made from the names of the model's layers and looked up, never parsed: kohya's `_` for `.` is ambiguous.
No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ldm.checkpoint.single.flow_names import flow_layers
from ldm.checkpoint.single.names import translated, unet_modules
from ldm.errors import ModelError
from ldm.nn.mmdit_config import MMDiTConfig
from ldm.nn.unet_config import UNetConfig

PARTS = ("unet", "text_encoder", "text_encoder_2")
FLOW_PREFIX = "transformer"  # in place of "unet" in diffusers' and OneTrainer's files of SD3 and FLUX
KOHYA = {
    "unet": ("lora_unet", "lora_transformer"),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
}
CLIP = "text_model."  # files have it; transformers 5 leaves it out of CLIPTextModel
ROLES = {  # how a key ends -> what the tensor is
    ".lora_A.weight": "down",  # PEFT
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",  # PEFT, the adapter's name left in
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",  # diffusers
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",  # diffusers, text encoders
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",  # diffusers, attention processors
    "_lora.up.weight": "up",
    ".lora_down.weight": "down",  # kohya
    ".lora_up.weight": "up",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",  # kohya
    ".lora_magnitude_vector": "magnitude",  # PEFT
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
}
OTHER_KINDS = {"hada_w": "LoHa", "lokr_w": "LoKr", "oft_": "OFT", "lora_mid": "LoCon in Tucker form", "ia3": "IA3"}
WRAPPERS = re.compile(r"^((?:unet|text_encoder|text_encoder_2)\.)?(?:base_model\.model|module|_orig_mod)\.")
OTHER_PREFIXES = {"lycoris_unet_": "lora_unet_", "lycoris_te": "lora_te", "lycoris_": "lora_unet_"}
OTHER_PREFIXES |= {"model.diffusion_model.": "unet.", "diffusion_model.": "unet."}  # trainers around ComfyUI's network
# The oldest files call a text encoder's layers as the U-Net's.
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def split_key(key: str) -> tuple[str, str] | None:
    """(the layer as the file names it, what the tensor is); None for a key that belongs to no low-rank update."""
    end = max((end for end in ROLES if key.endswith(end)), key=len, default=None)
    if end is None:
        return None
    layer = without_wrappers(key[: -len(end)].replace(".processor.", "."))
    if match := re.fullmatch(r"(.+\.self_attn\.)(to_q|to_k|to_v|to_out)", layer):
        layer = match[1] + OLD_TEXT[match[2]]
    elif layer.endswith(".to_out"):
        layer += ".0"
    return layer, ROLES[end]


def without_wrappers(layer: str) -> str:
    """A layer's name without what wrappers and trainers put around it: base_model.model., module., lycoris_, …"""
    while (plain := WRAPPERS.sub(r"\1", layer)) != layer:
        layer = plain
    for other, ours in OTHER_PREFIXES.items():
        if layer.startswith(other):
            return ours + layer[len(other) :]
    return layer


def spellings(shapes: Mapping[str, Iterable[str]], unet: UNetConfig | MMDiTConfig) -> dict[str, tuple[str, str]]:
    """Every name that a file may give a layer -> (part, layer); `shapes` has the names of each part's layers.

    Raises ModelError where two layers would share a name.
    """
    table: dict[str, tuple[str, str]] = {}
    for part, names in shapes.items():
        names = list(names)
        originals = original_names(names, unet) if part == "unet" else {}
        for name in names:
            for spelt in dict.fromkeys(_spellings(part, name, originals.get(name))):
                if table.setdefault(spelt, (part, name)) != (part, name):
                    raise ModelError(f"{name} and {table[spelt][1]} would both be {spelt} in a LoRA file", where=part)
    return table


def _spellings(part: str, name: str, original: str | None) -> list[str]:
    if part == "unet":
        forms, bare = [name, *([original] if original else [])], [name]  # the oldest files have no prefix at all
        bare += [f"{FLOW_PREFIX}.{name}"]
    else:
        stem, bare = name.removeprefix(CLIP), []
        forms = [stem, CLIP + stem]
    flat = [f"{prefix}_{flattened(form)}" for prefix in KOHYA[part] for form in forms]
    return [*(f"{part}.{form}" for form in forms), *bare, *flat]


def stacked_spellings(unet: UNetConfig | MMDiTConfig) -> dict[str, tuple[str, ...]]:
    """Every name that a file may give layers of a flow transformer that it holds as one -> their names."""
    if isinstance(unet, UNetConfig):
        return {}
    stacked = {old: names for old, names in flow_layers(unet).items() if len(names) > 1}
    return {
        spelt: names
        for old, names in stacked.items()
        for spelt in (f"unet.{old}", f"{FLOW_PREFIX}.{old}", old, f"lora_unet_{flattened(old)}")
    }


def flattened(name: str) -> str:
    return name.replace(".", "_")


def peft_name(part: str, name: str, flow: bool = False) -> str:
    """A layer's name in files in the layout of PEFT and diffusers; `flow`: of a flow transformer's model."""
    return f"{FLOW_PREFIX if flow and part == 'unet' else part}.{_in_files(part, name)}"


def kohya_name(part: str, name: str, originals: Mapping[str, str], xl: bool, flow: bool = False) -> str:
    """A layer's name in kohya's files: diffusers', for XL's U-Net the original code's (`originals`, see sgm_names).

    Of flow transformers OneTrainer's name, which ComfyUI reads too: kohya's own holds q, k and v as one layer.
    """
    if flow and part == "unet":
        return f"{KOHYA[part][1]}_{flattened(name)}"
    prefix = "lora_te1" if xl and part == "text_encoder" else KOHYA[part][0]
    return f"{prefix}_{flattened(originals[name] if xl and part == 'unet' else _in_files(part, name))}"


def _in_files(part: str, name: str) -> str:
    return CLIP + name if part != "unet" and name.startswith("encoder.layers.") else name


def original_names(names: Iterable[str], unet: UNetConfig | MMDiTConfig) -> dict[str, str]:
    """diffusers' names of a network's layers -> the original code's, where one layer is one there too."""
    if isinstance(unet, UNetConfig):
        return sgm_names(names, unet)
    back = {new[0]: old for old, new in flow_layers(unet).items() if len(new) == 1}
    return {name: back[name] for name in names if name in back and back[name] != name}


def sgm_names(names: Iterable[str], unet: UNetConfig) -> dict[str, str]:
    """diffusers' names of a U-Net's layers -> the original code's, which kohya's XL files use."""
    back = {new: old for old, new in unet_modules(unet).items()}
    renamed = {name: translated(name, back) for name in names}
    return {name: original for name, original in renamed.items() if original is not None}
