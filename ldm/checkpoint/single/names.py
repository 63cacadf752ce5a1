"""The names of tensors: Stable Diffusion's original names in a single file, and those of diffusers' folders.

All tables are computed from the parts' settings, so that they hold for networks of any width and depth. An entry maps
a module (or a whole name) of the file to that of the folder; the rest of a name stays as it is. No torch.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ldm.checkpoint.folder import OTHER_TOWERS
from ldm.checkpoint.single.flow_names import flow_modules, has_halves_swapped, shares
from ldm.nn.mmdit_config import MMDiTConfig
from ldm.nn.unet_config import UNetConfig

Config = Mapping[str, Any]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
FLUX_VAE = "vae."
QKV = ("q_proj", "k_proj", "v_proj")  # the order in which OpenCLIP stacks them as in_proj
RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2"}
RESNET |= {"out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn": "self_attn",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}  # of the VAE


class Stack(NamedTuple):
    """One module of a flow transformer's original code."""

    names: tuple[str, ...]  # of the modules in the folder that are stacked in it
    swapped: bool = False  # whether its halves are in the other order


@dataclass(frozen=True)
class Part:
    """One component of a model inside a single file."""

    name: str  # unet or transformer, vae, text_encoder, text_encoder_2, text_encoder_3
    prefixes: tuple[str, ...]  # of its tensors in a file; the first one is written
    modules: Mapping[str, str]  # module in the file -> module in the folder; {} for equal names
    form: str = "same"  # how tensors differ: same, vae (1x1 convolutions in attention), open_clip (stacked q, k, v)
    stacks: Mapping[str, Stack] = field(default_factory=dict)  # of a flow transformer: module in the file -> what it is
    unused: tuple[str, ...] = ()  # beginnings of names that a file may have and a folder has not

    def inner(self, key: str) -> str | None:
        """The key without this part's prefix; None for the key of another part."""
        prefix = next((prefix for prefix in self.prefixes if key.startswith(prefix)), None)
        return None if prefix is None else key[len(prefix) :]


@dataclass(frozen=True)
class Destination:
    """Where a tensor of a single file goes: its name in the folder, or several names for stacked q, k, v."""

    part: str
    names: tuple[str, ...]
    change: str = ""  # transposed, flat (a 1x1 convolution as a matrix), swapped (its halves), or nothing
    shares: tuple[int, ...] = (1,)  # of the stack's rows, for each name

    def rows(self, total: int) -> list[int] | None:
        """How many of so many rows each name gets; None where they cannot be shared out."""
        whole = sum(self.shares)
        return None if total % whole else [total // whole * share for share in self.shares]


def destination_of(part: Part, key: str) -> Destination | None:
    """Where one tensor of a file goes; None for a name that `part` does not have."""
    if part.stacks:
        return _of_stack(part, part.inner(key) or "")
    name = translated(part.inner(key) or "", part.modules)
    if name is None:
        return None
    module, _, tensor_name = name.rpartition(".")
    if part.form == "open_clip" and tensor_name in ("in_proj_weight", "in_proj_bias"):
        names = tuple(f"{module}.{proj}.{tensor_name.removeprefix('in_proj_')}" for proj in QKV)
        return Destination(part.name, names, shares=(1, 1, 1))
    if part.form == "open_clip" and name == "text_projection.weight":
        return Destination(part.name, (name,), "transposed")
    flat = part.form == "vae" and ".attentions." in name and tensor_name == "weight" and "group_norm" not in name
    return Destination(part.name, (name,), "flat" if flat else "")


def _of_stack(part: Part, key: str) -> Destination | None:
    module, tail = _split(key, part.stacks)
    if module is None:
        return None
    stack = part.stacks[module]
    change = "swapped" if stack.swapped else ""
    return Destination(part.name, tuple(name + tail for name in stack.names), change, shares(stack.names))


def originals(part: Part, names: Iterable[str]) -> Iterator[tuple[str, Destination | None]]:
    """(key in the file, where it goes) for a component's tensors; (name, None) where the file has no such name."""
    back, prefix, done = {new: old for old, new in part.modules.items()}, part.prefixes[0], set()
    back |= {new: old for old, stack in part.stacks.items() for new in stack.names}
    for name in names:
        old = translated(name, back)
        if old is not None and part.form == "open_clip":
            for one in QKV:
                old = old.replace(f".attn.{one}.", ".attn.in_proj_")
        if old is None:
            yield name, None
        elif old not in done:
            done.add(old)
            yield prefix + old, destination_of(part, prefix + old)


def translated(name: str, modules: Mapping[str, str]) -> str | None:
    """`name` with the longest module at its beginning replaced; None where no module matches."""
    if not modules:
        return name or None
    module, tail = _split(name, modules)
    return None if module is None else modules[module] + tail


def _split(name: str, modules: Container[str]) -> tuple[str | None, str]:
    """(the longest of the modules at the beginning of a name, the rest of the name)."""
    head, tail = name, ""
    while head:
        if head in modules:
            return head, tail
        head, dot, last = head.rpartition(".")
        tail = dot + last + tail
    return None, name


def parts_of(configs: Mapping[str, Config]) -> dict[str, Part]:
    """The components of a model with these settings (component -> config.json), as a single file holds them."""
    if "transformer" in configs:
        return _flow_parts(configs)
    unet = UNetConfig.from_diffusers(configs["unet"])
    parts = {"unet": Part("unet", (UNET,), unet_modules(unet)), "vae": vae_part(configs["vae"])}
    for name in ("text_encoder", "text_encoder_2"):
        if name in configs:
            parts[name] = text_part(name, configs[name], unet)
    return parts


def _flow_parts(configs: Mapping[str, Config]) -> dict[str, Part]:
    """The components of SD3 or FLUX as ComfyUI's files hold them; the transformer may have no prefix (BFL's files)."""
    config = MMDiTConfig.from_diffusers(configs["transformer"])
    parts = {"vae": vae_part(configs["vae"], *((FLUX_VAE, VAE) if config.is_flux else (VAE, FLUX_VAE)))}
    for name, short in flow_texts(config.is_flux).items():
        if name in configs:
            projects = _projects(configs[name]) or short == "t5xxl"
            unused = ("text_model.embeddings.position_ids", *(() if projects else ("text_projection.weight",)))
            parts[name] = Part(name, (text_prefix(short),), {}, unused=unused)
    stacks = {old: Stack(new, has_halves_swapped(old, config)) for old, new in flow_modules(config).items()}
    return {**parts, "transformer": Part("transformer", (UNET, ""), {}, stacks=stacks)}  # the last: "" fits all keys


def flow_texts(flux: bool) -> dict[str, str]:
    """The text encoders of FLUX or SD3 -> what files and people call them."""
    names = ("clip_l", "t5xxl") if flux else ("clip_l", "clip_g", "t5xxl")
    return dict(zip(("text_encoder", "text_encoder_2", "text_encoder_3"), names))


def text_prefix(short: str) -> str:
    """Of a text encoder's tensors in ComfyUI's whole files of SD3 and FLUX."""
    return f"text_encoders.{short}.transformer."


def vae_part(config: Config, *prefixes: str) -> Part:
    unused = ("loss.", "model_ema.")
    return Part("vae", prefixes or (VAE,), vae_modules(config), "vae", unused=unused)


def text_part(name: str, config: Config, unet: UNetConfig) -> Part:
    """A text encoder: with transformers' names in 1.x and as XL's first, with OpenCLIP's in 2.x and as XL's second."""
    xl = unet.addition_embed_type == "text_time"
    clip = "CLIP" in (config.get("architectures") or ("CLIP",))[0]
    if not clip or (name == "text_encoder" and (xl or not unet.use_linear_projection)):
        prefix = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
        unused = ("text_model.embeddings.position_ids", "embeddings.position_ids", *OTHER_TOWERS)
        unused += () if _projects(config) else ("text_projection.weight",)
        return Part(name, (prefix,), {}, unused=unused)
    inside = (
        ("conditioner.embedders.1.model.",) if xl else ("cond_stage_model.model.", "conditioner.embedders.0.model.")
    )
    unused = ["logit_scale", "attn_mask", f"transformer.resblocks.{config['num_hidden_layers']}."]
    unused += [] if _projects(config) else ["text_projection"]
    return Part(name, inside, open_clip_modules(config), "open_clip", unused=tuple(unused))


def _projects(config: Config) -> bool:
    return (config.get("architectures") or ("",))[0].endswith("WithProjection")


def unet_modules(config: UNetConfig) -> dict[str, str]:
    """The U-Net: numbered input blocks, a middle and numbered output blocks."""
    table = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    table |= {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
    if config.addition_embed_type == "text_time":
        table |= {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
    else:
        table["add_embedding"] = "add_embedding"  # pooled text, which the original code does not know
    levels, number = len(config.block_out_channels), 1
    for level in range(levels):
        down = f"down_blocks.{level}"
        for i in range(config.layers_per_block):
            table |= _resnet(f"input_blocks.{number}.0", f"{down}.resnets.{i}")
            if config.transformer_layers[level]:
                table[f"input_blocks.{number}.1"] = f"{down}.attentions.{i}"
            number += 1
        if level < levels - 1:
            table[f"input_blocks.{number}.0.op"] = f"{down}.downsamplers.0.conv"
            number += 1
    table |= _resnet("middle_block.0", "mid_block.resnets.0") | _resnet("middle_block.2", "mid_block.resnets.1")
    table["middle_block.1"] = "mid_block.attentions.0"
    number = 0
    for level in range(levels):
        up, attends = f"up_blocks.{level}", config.transformer_layers[levels - 1 - level]
        for i in range(config.layers_per_block + 1):
            table |= _resnet(f"output_blocks.{number}.0", f"{up}.resnets.{i}")
            if attends:
                table[f"output_blocks.{number}.1"] = f"{up}.attentions.{i}"
            number += 1
        if level < levels - 1:
            table[f"output_blocks.{number - 1}.{2 if attends else 1}.conv"] = f"{up}.upsamplers.0.conv"
    return table


def _resnet(old: str, new: str) -> dict[str, str]:
    return {f"{old}.{inside}": f"{new}.{name}" for inside, name in RESNET.items()}


def vae_modules(config: Config) -> dict[str, str]:
    """The autoencoder; the original code counts the decoder's levels from the highest resolution."""
    table = {name: name for name in ("quant_conv", "post_quant_conv")}
    levels, layers = len(config["block_out_channels"]), config.get("layers_per_block", 1)
    for side, way, moves in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        table |= {f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")}
        table[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        for level in range(levels):
            old = f"{side}.{way}.{level if way == 'down' else levels - 1 - level}"
            new = f"{side}.{way}_blocks.{level}"
            for i in range(layers + (way == "up")):
                table[f"{old}.block.{i}"] = f"{new}.resnets.{i}"
                table[f"{old}.block.{i}.nin_shortcut"] = f"{new}.resnets.{i}.conv_shortcut"
            table[f"{old}.{moves}.conv"] = f"{new}.{moves}rs.0.conv"
        for i in (0, 1):
            table[f"{side}.mid.block_{i + 1}"] = f"{side}.mid_block.resnets.{i}"
        for old, new in ATTENTION.items():
            table[f"{side}.mid.attn_1.{old}"] = f"{side}.mid_block.attentions.0.{new}"
    return table


def open_clip_modules(config: Config) -> dict[str, str]:
    """OpenCLIP's text tower -> transformers' names."""
    table = {"token_embedding": "text_model.embeddings.token_embedding", "ln_final": "text_model.final_layer_norm"}
    table["positional_embedding"] = "text_model.embeddings.position_embedding.weight"
    if _projects(config):
        table["text_projection"] = "text_projection.weight"
    for i in range(config["num_hidden_layers"]):
        for old, new in BLOCK.items():
            table[f"transformer.resblocks.{i}.{old}"] = f"text_model.encoder.layers.{i}.{new}"
    return table
