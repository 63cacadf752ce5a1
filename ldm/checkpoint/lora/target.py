"""What a LoRA can change: the linear layers and convolutions of a model, by the shapes of their weights.

They come from a loaded model, from the headers of its files, or from the settings of its family alone (no torch:
building the U-Net on the meta device instead takes ten times as long, nearly all of it to import torch).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.checkpoint.build import network_config
from ldm.checkpoint.families import Family
from ldm.checkpoint.folder import T5, Layout, default_folder, read_layout
from ldm.checkpoint.lora.names import PARTS
from ldm.checkpoint.safety import read_header
from ldm.checkpoint.single import listed_texts, plan_of
from ldm.checkpoint.single.plan import network_of
from ldm.checkpoint.types import Model
from ldm.nn.mmdit_config import MMDiTConfig
from ldm.nn.unet_config import UNetConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """The layers of a model, as far as matching a LoRA with them needs it."""

    shapes: Mapping[str, Mapping[str, Shape]]  # part -> layer -> shape of its weight
    unet: UNetConfig | MMDiTConfig


def networks(model: Model) -> dict[str, Any]:
    """The networks that a LoRA can change, under the names that files give them."""
    clips = getattr(model.text, "clips", None)  # of SD3 and FLUX: T5 stays as it is
    texts = model.text.modules if clips is None else [clip.model for clip in clips]
    return dict(zip(PARTS, (model.unet, *texts)))


def target_of(model: Model) -> Target:
    """The layers of a loaded model."""
    from ldm.nn.lora import layers_of

    shapes = {
        part: {name: tuple(layer.weight.shape) for name, layer in layers_of(module).items()}
        for part, module in networks(model).items()
    }
    return Target(shapes, model.unet.config)


def target_at(model: Any, prediction_type: str | None = None, text_encoders: Any = None) -> Target | None:
    """The layers of a model's folder or file, or of a loaded model; None where weights would have to be fetched."""
    if not isinstance(model, (str, os.PathLike)):
        return target_of(model)
    path = default_folder() if str(model) == "default" else Path(os.path.expanduser(model))
    if path.is_dir():
        return target_in(read_layout(path, skip=("vae",)))
    if not path.is_file():
        return None
    plan = plan_of(path, prediction_type, ("vae",), texts=listed_texts(text_encoders))
    inside = {part: plan.network if part == "unet" else part for part in PARTS}
    if plan.network == "transformer":  # T5 stays as it is
        t5 = {part for part, config in plan.configs.items() if config.get("model_type") == "t5"}
        inside = {part: name for part, name in inside.items() if name not in t5}
    shapes = {part: _layers(plan.shapes(name).items()) for part, name in inside.items() if name in plan.configs}
    return Target(shapes, network_of(plan))


def target_in(layout: Layout) -> Target:
    """The layers of a model's folder, from the headers of its weight files; no torch."""
    shapes: dict[str, dict[str, Shape]] = {}
    for part in PARTS:
        inside = layout.network if part == "unet" else part
        if inside not in layout.weights or (
            part != "unet" and layout.text_class(part) in T5 and layout.network != "unet"
        ):
            continue
        tables = [read_header(path).tensors for path in layout.shards(inside)]
        shapes[part] = _layers((name, tensor.shape) for table in tables for name, tensor in table.items())
    return Target(shapes, network_config(layout))


def _layers(tensors: Iterable[tuple[str, Shape]]) -> dict[str, Shape]:
    """Linear layers and convolutions, by the names and shapes of their weights."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in tensors
        if name.endswith(".weight") and len(shape) in (2, 4) and not name.endswith("embedding.weight")
    }


def target_for(family: Family) -> Target:
    """The layers that every model of a family has."""
    config = UNetConfig.from_diffusers(family.unet)
    texts = {part: dict(text_layers(settings)) for part, settings in family.text.items()}
    return Target({"unet": dict(unet_layers(config)), **texts}, config)


def text_layers(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """The layers of one of CLIP's text encoders, from its config.json."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    for i in range(config["num_hidden_layers"]):
        name = f"text_model.encoder.layers.{i}"
        for one in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{name}.self_attn.{one}", (width, width)
        yield f"{name}.mlp.fc1", (inner, width)
        yield f"{name}.mlp.fc2", (width, inner)
    if config["architectures"][0].endswith("WithProjection"):
        yield "text_projection", (config["projection_dim"], width)


def unet_layers(config: UNetConfig) -> Iterator[tuple[str, Shape]]:
    """The layers of a U-Net of 1.x, 2.x or XL, in the order of the network."""
    widths, layers, last = config.block_out_channels, config.layers_per_block, len(config.block_out_channels) - 1
    embed = 4 * widths[0]
    yield "conv_in", (widths[0], config.in_channels, 3, 3)
    yield from _pair("time_embedding", widths[0], embed)
    if config.addition_embed_type == "text_time":
        yield from _pair("add_embedding", config.projection_class_embeddings_input_dim, embed)
    skips = [widths[0]]
    for level, width in enumerate(widths):
        inputs = [skips[-1]] + [width] * (layers - 1)
        yield from _level(f"down_blocks.{level}", inputs, level, config)
        skips += [width] * layers
        if level < last:
            yield f"down_blocks.{level}.downsamplers.0.conv", (width, width, 3, 3)
            skips.append(width)
    width = widths[-1]
    for i in range(2):
        yield from _resnet(f"mid_block.resnets.{i}", width, width, embed)
    yield from _transformer("mid_block.attentions.0", width, config.mid_transformer_layers, config)
    below = width
    for number, level in enumerate(reversed(range(len(widths)))):
        width = widths[level]
        inputs = [channels + skips.pop() for channels in [below] + [width] * layers]
        yield from _level(f"up_blocks.{number}", inputs, level, config)
        if level > 0:
            yield f"up_blocks.{number}.upsamplers.0.conv", (width, width, 3, 3)
        below = width
    yield "conv_out", (config.out_channels, widths[0], 3, 3)


def _level(name: str, inputs: list[int], level: int, config: UNetConfig) -> Iterator[tuple[str, Shape]]:
    width, embed = config.block_out_channels[level], 4 * config.block_out_channels[0]
    for i, channels in enumerate(inputs):
        yield from _resnet(f"{name}.resnets.{i}", channels, width, embed)
        if depth := config.transformer_layers[level]:
            yield from _transformer(f"{name}.attentions.{i}", width, depth, config)


def _pair(name: str, width: int, embed: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.linear_1", (embed, width)
    yield f"{name}.linear_2", (embed, embed)


def _resnet(name: str, channels: int, out: int, embed: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.conv1", (out, channels, 3, 3)
    yield f"{name}.time_emb_proj", (out, embed)
    yield f"{name}.conv2", (out, out, 3, 3)
    if channels != out:
        yield f"{name}.conv_shortcut", (out, channels, 1, 1)


def _transformer(name: str, width: int, depth: int, config: UNetConfig) -> Iterator[tuple[str, Shape]]:
    square = (width, width) if config.use_linear_projection else (width, width, 1, 1)
    yield f"{name}.proj_in", square
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for attention, source in (("attn1", width), ("attn2", config.cross_attention_dim)):
            yield f"{block}.{attention}.to_q", (width, width)
            yield f"{block}.{attention}.to_k", (width, source)
            yield f"{block}.{attention}.to_v", (width, source)
            yield f"{block}.{attention}.to_out.0", (width, width)
        yield f"{block}.ff.net.0.proj", (8 * width, width)
        yield f"{block}.ff.net.2", (width, 4 * width)
    yield f"{name}.proj_out", square
