"""The linear layers and convolutions of networks, from their settings alone, without torch: what a LoRA may change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ldm.checkpoint.families import Family
from ldm.checkpoint.lora import Target
from ldm.nn.unet_config import UNetConfig

Layer = tuple[str, tuple[int, ...]]  # name, shape of its weight


def target_for(family: Family) -> Target:
    """The layers of a family's models."""
    config = UNetConfig.from_diffusers(family.unet)
    texts = {part: dict(text_layers(settings)) for part, settings in family.text.items()}
    return Target({"unet": dict(unet_layers(config)), **texts}, config)


def text_layers(config: Mapping[str, Any]) -> Iterator[Layer]:
    """Of one of CLIP's text encoders."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    for i in range(config["num_hidden_layers"]):
        name = f"text_model.encoder.layers.{i}"
        for one in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{name}.self_attn.{one}", (width, width)
        yield f"{name}.mlp.fc1", (inner, width)
        yield f"{name}.mlp.fc2", (width, inner)
    if config["architectures"][0].endswith("WithProjection"):
        yield "text_projection", (config["projection_dim"], width)


def unet_layers(config: UNetConfig) -> Iterator[Layer]:
    """Of the U-Net of 1.x, 2.x and XL, in the order of the network."""
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


def _level(name: str, inputs: list[int], level: int, config: UNetConfig) -> Iterator[Layer]:
    width, embed = config.block_out_channels[level], 4 * config.block_out_channels[0]
    for i, channels in enumerate(inputs):
        yield from _resnet(f"{name}.resnets.{i}", channels, width, embed)
        if depth := config.transformer_layers[level]:
            yield from _transformer(f"{name}.attentions.{i}", width, depth, config)


def _pair(name: str, width: int, embed: int) -> Iterator[Layer]:
    yield f"{name}.linear_1", (embed, width)
    yield f"{name}.linear_2", (embed, embed)


def _resnet(name: str, channels: int, out: int, embed: int) -> Iterator[Layer]:
    yield f"{name}.conv1", (out, channels, 3, 3)
    yield f"{name}.time_emb_proj", (out, embed)
    yield f"{name}.conv2", (out, out, 3, 3)
    if channels != out:
        yield f"{name}.conv_shortcut", (out, channels, 1, 1)


def _transformer(name: str, width: int, depth: int, config: UNetConfig) -> Iterator[Layer]:
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
