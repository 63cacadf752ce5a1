"""The cross-attention U-Net of Stable Diffusion 1.x, 2.x and XL (Rombach et al. 2022; Podell et al. 2023).

Module names follow diffusers' UNet2DConditionModel: a checkpoint loads with strict=True and no key map.
Shapes:  B batch   C channels   H, W latent height, width   L = H*W   S text tokens   D text width   E time embedding
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from ldm.errors import ModelError
from ldm.nn.attention import AttentionPooling, TextCache, attention, remember, set_backend
from ldm.nn.batch_invariant import Linear, Pointwise, added, layout, pad_to_even_batch, per_image, silu
from ldm.nn.positions import guidance_waves
from ldm.nn.step_cache import StepCache
from ldm.nn.unet_config import UNetConfig
from ldm.nn.weights import load_weights, on_meta
from ldm.nn.winograd import RUN, Conv3x3

__all__ = ["UNet", "UNetConfig", "load_unet"]


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out: int, embed: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-5)
        self.conv1 = Conv3x3(channels, out)
        self.time_emb_proj = Linear(embed, out)
        self.norm2 = nn.GroupNorm(groups, out, eps=1e-5)
        self.conv2 = Conv3x3(out, out)
        self.conv_shortcut = Pointwise(channels, out) if channels != out else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x (B, C, H, W), temb (B, E) after its silu -> (B, out, H, W)."""
        h = self.conv1(silu(self.norm1(x), self.training))
        h = added(h, self.time_emb_proj(temb)[:, :, None, None])
        shortcut = self.conv_shortcut(x)  # before conv2: gradients are summed in the reverse of this order
        return added(self.conv2(silu(self.norm2(h), self.training)), shortcut)


class Attention(nn.Module):
    backend = "auto"

    def __init__(self, channels: int, num_heads: int, context: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(context, channels, bias=False)
        self.to_v = Linear(context, channels, bias=False)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor, mask=None, perturb=None, cache: TextCache | None = None) -> Tensor:
        """x (B, L, C), context (B, S, D) -> (B, L, C)."""
        q = self.to_q(x)  # first: gradients are summed in the reverse of this order, and resumed runs keep their bits
        k, v = remember(cache, self, lambda: (self.to_k(context), self.to_v(context)))  # (B, S, C) both
        mixed = attention(q, k, v, self.num_heads, mask, self.backend)
        if perturb is not None:  # the map of attention is the identity in these rows (Ahn et al. 2024)
            mixed = torch.where(perturb[:, None, None], v, mixed)
        if cache is not None and cache.beside is not None:
            mixed = cache.beside(self, q, mixed)
        return self.to_out[0](mixed)


class GEGLU(nn.Module):
    """Shazeer 2020: x W1 * gelu(x W2)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        gate = per_image(F.gelu, gate, self.training)
        return x * gate if torch.is_grad_enabled() else gate.mul_(x)


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, channels: int, num_heads: int, context: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, num_heads, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, num_heads, context)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, states: Tensor, mask, perturb, cache=None) -> Tensor:  # (B, L, C) -> (B, L, C)
        h = self.norm1(x)
        x = added(self.attn1(h, h, perturb=perturb), x)
        x = added(self.attn2(self.norm2(x), states, mask, cache=cache), x)
        return added(self.ff(self.norm3(x)), x)


class Transformer2D(nn.Module):
    def __init__(self, channels: int, layers: int, num_heads: int, config: UNetConfig):
        super().__init__()
        self.linear = config.use_linear_projection
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.proj_in = Linear(channels, channels) if self.linear else Pointwise(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, num_heads, config.cross_attention_dim) for _ in range(layers)
        )
        self.proj_out = Linear(channels, channels) if self.linear else Pointwise(channels, channels)

    def forward(self, x: Tensor, states: Tensor, mask, perturb, cache=None) -> Tensor:  # (B, C, H, W) -> the same
        h = self.norm(x)
        h = self.proj_in(tokens(h)) if self.linear else tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, states, mask, perturb, cache)
        return added(to_spatial(self.proj_out(h), x) if self.linear else self.proj_out(to_spatial(h, x)), x)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, L, C)


def to_spatial(h: Tensor, like: Tensor) -> Tensor:
    return h.transpose(1, 2).reshape(like.shape)  # (B, L, C) -> (B, C, H, W)


def unchanged(x: Tensor, *context) -> Tensor:
    """Stands where a level has no attention."""
    return x


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H/2, W/2), rounded up
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:  # (B, C, h, w) -> (B, C, *size)
        return self.conv(doubled(x, size) if is_compiling() else F.interpolate(x, size=size, mode="nearest"))


def doubled(x: Tensor, size: torch.Size) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), as `interpolate` does it; size: (2h or 2h - 1, 2w or 2w - 1).

    For code that is compiled: in bf16 on a CPU the gradient of `interpolate` is zero there (torch 2.13), and nothing
    below the last level would be trained.
    """
    batch, channels, height, width = x.shape
    x = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
    return x.reshape(batch, channels, 2 * height, 2 * width)[:, :, : size[0], : size[1]]


def sinusoidal(values: Tensor, channels: int) -> Tensor:
    """values (N,) -> (N, channels): cosines, then sines, of frequencies from 1 down to 1/10000, in fp32."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    def __init__(self, channels: int, embed: int, beside: int | None = None):
        super().__init__()
        if beside is not None:  # the width of what is added to the timestep's waves
            self.cond_proj = Linear(beside, channels, bias=False)
        self.linear_1 = Linear(channels, embed)
        self.linear_2 = Linear(embed, embed)

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor:  # (B, channels), (B, beside) -> (B, E)
        if beside is not None:
            x = x + self.cond_proj(beside)
        return self.linear_2(silu(self.linear_1(x), self.training))


class TextTimeEmbedding(nn.Module):
    """Text pooled into the time embedding (addition_embed_type "text")."""

    def __init__(self, width: int, embed: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.pool = AttentionPooling(width, num_heads)
        self.proj = Linear(width, embed)
        self.norm2 = nn.LayerNorm(embed)

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:  # (B, S, D), (B, S) -> (B, E)
        return self.norm2(self.proj(self.pool(self.norm1(states), mask)))


class Level(nn.Module):
    """One level of one side: resnets with the channels (in, ...), each followed by a transformer if there are any."""

    attentions: Iterable[Callable[..., Tensor]]
    downsamplers: nn.ModuleList  # one, on the way down, but not of the last level
    upsamplers: nn.ModuleList  # one, on the way up, but not of the first level

    def __init__(self, inputs: list[int], level: int, config: UNetConfig):
        super().__init__()
        channels, layers = config.block_out_channels[level], config.transformer_layers[level]
        embed = 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(ResnetBlock(i, channels, embed, config.norm_num_groups) for i in inputs)
        if layers:
            self.attentions = nn.ModuleList(
                Transformer2D(channels, layers, config.num_heads[level], config) for _ in inputs
            )
        else:
            self.attentions = [unchanged] * len(inputs)


class Middle(nn.Module):
    def __init__(self, config: UNetConfig):
        super().__init__()
        channels, embed = config.block_out_channels[-1], 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, embed, config.norm_num_groups) for _ in range(2))
        self.attentions = nn.ModuleList(
            [Transformer2D(channels, config.mid_transformer_layers, config.num_heads[-1], config)]
        )


class Encoder(nn.Module):
    """The way down and the middle: half of a U-Net, and all but the ends of a ControlNet (ldm.nn.controlnet).

    `gradient_checkpointing` computes each layer's activations again in the backward pass instead of keeping them.
    """

    add_embedding: TextTimeEmbedding | TimestepEmbedding

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.attention_levels = config.attention_levels
        widths, layers = config.block_out_channels, config.layers_per_block
        embed = 4 * widths[0]

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], embed, config.time_cond_proj_dim)
        if config.addition_embed_type == "text":
            width, heads = config.cross_attention_dim, config.addition_embed_type_num_heads
            self.add_embedding = TextTimeEmbedding(width, embed, heads)
        elif config.addition_embed_type == "text_time":
            assert config.projection_class_embeddings_input_dim is not None  # as UNetConfig has checked
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, embed)

        self.down_blocks, skips, last = nn.ModuleList(), [widths[0]], len(widths) - 1
        for level, width in enumerate(widths):
            block = Level([skips[-1]] + [width] * (layers - 1), level, config)
            skips += [width] * layers
            if level < last:
                block.downsamplers = nn.ModuleList([Downsample(width)])
                skips.append(width)
            self.down_blocks.append(block)
        self.skip_channels = tuple(skips)  # of what is handed across, from the highest resolution down

        self.mid_block = Middle(config)

    def set_attention(self, name: str) -> None:
        """Takes this backend ("auto" or a name of BACKENDS) from now on. Raises ConfigError or ModelError."""
        set_backend(self, Attention, name)

    def prepare(self) -> TextCache:
        """Get ready for a run that changes no weight; returns the run's cache, which `forward` takes."""
        for module in self.modules():
            if isinstance(module, Conv3x3):
                module.refresh()
        return TextCache()

    def _ready(self, cache: TextCache | None, states: Tensor, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs, x first, as layers take them: where images are drawn in even batches, laid out for the device."""
        if cache is not None:
            cache.follow(states)
        if self.training:
            return inputs
        if not is_compiling():
            RUN.tiles = cache is not None  # else the bits would depend on what was drawn before
        x, *rest = pad_to_even_batch(*inputs)
        return x.contiguous(memory_format=layout(x.device, x.dtype, self.config)), *rest

    def down(self, x: Tensor, temb: Tensor, context: Mapping[str, tuple]) -> tuple[Tensor, list[Tensor]]:
        """What `conv_in` made (B, C, H, W) -> (the middle's output, what is handed across)."""
        skips = [x]
        for i, block in enumerate(cast("list[Level]", self.down_blocks)):
            for resnet, transformer in zip(block.resnets, block.attentions):
                x = self.run(resnet, x, temb)
                x = self.run(transformer, x, *context.get(f"down.{i}", ()))
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)
        x = self.run(self.mid_block.resnets[0], x, temb)
        x = self.run(self.mid_block.attentions[0], x, *context["mid"])
        return self.run(self.mid_block.resnets[1], x, temb), skips

    def _embed(self, x, timesteps, states, mask, pooled, time_ids, guidance, cache) -> Tensor:
        """The time embedding (B, E), with what `addition_embed_type` adds to it."""
        waves = partial(sinusoidal, channels=self.config.block_out_channels[0])
        told = guidance is not None and self.config.time_cond_proj_dim is not None  # ControlNets are not
        beside = self._embed_guidance(guidance, x.dtype) if told else None
        temb = self.time_embedding(per_image(waves, timesteps, self.training).to(x.dtype), beside)
        if self.config.addition_embed_type == "text":
            temb = temb + remember(cache, self.add_embedding, lambda: self.add_embedding(states, mask))
        elif self.config.addition_embed_type == "text_time":
            temb = temb + self._embed_sizes(pooled, time_ids, x.dtype)
        return temb

    def _embed_guidance(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """LCM's: guidance scales (B,) -> (B, time_cond_proj_dim)."""
        waves = partial(guidance_waves, channels=cast("int", self.config.time_cond_proj_dim))
        return per_image(waves, scales, self.training).to(dtype)

    def _embed_sizes(self, pooled: Tensor | None, time_ids: Tensor | None, dtype: torch.dtype) -> Tensor:
        """XL's: pooled text (B, P) and time_ids (B, 6) -> (B, E)."""
        if pooled is None or time_ids is None:
            raise ModelError("this U-Net (addition_embed_type 'text_time') needs pooled text and time_ids")
        assert self.config.addition_time_embed_dim is not None  # as UNetConfig has checked
        waves = partial(sinusoidal, channels=self.config.addition_time_embed_dim)
        sizes = torch.cat([waves(ids).flatten()[None] for ids in time_ids]).to(dtype)  # (B, 6 * that)
        return self.add_embedding(torch.cat([pooled, sizes], dim=-1))

    def run(self, layer: Callable[..., Tensor], *args) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)


class UNet(Encoder):
    """Predicts noise, velocity or x0 (what it was trained for) from noisy latents, timesteps and text.

    In eval mode an image's bits do not depend on the batch it is in (see Linear and `forward`).
    """

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        widths, layers = config.block_out_channels, config.layers_per_block
        skips = list(self.skip_channels)
        self.up_blocks, below = nn.ModuleList(), widths[-1]
        for level in reversed(range(len(widths))):
            width = widths[level]
            inputs = [below] + [width] * layers
            block = Level([channels + skips.pop() for channels in inputs], level, config)
            if level > 0:
                block.upsamplers = nn.ModuleList([Upsample(width)])
            below = width
            self.up_blocks.append(block)

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        states: Tensor,
        *,
        mask: Tensor | None = None,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        cache: TextCache | None = None,
        perturb: Tensor | None = None,
        perturb_in: tuple[str, ...] = (),
        residuals: Sequence[Tensor] = (),
        deep: StepCache | None = None,
    ) -> Tensor:
        """x (B, C_in, H, W), timesteps (B,), states (B, S, D), mask (B, S) bool, pooled (B, P), time_ids (B, 6) or (6,)
        -> (B, C_out, H, W), all in x's dtype. `pooled` and `time_ids` are read by XL alone.
        guidance (B,): the scale itself, of U-Nets that have it as an input (LCM's); None: left out, as in diffusers.
        cache: what `prepare` returned, where the call is one step of a run.
        perturb (B,) bool: rows in which self-attention is the identity, in `perturb_in` of `attention_levels`.
        residuals: added to what is handed across, level by level, and to the middle's output: what a ControlNet gives.
        deep: of a run whose steps share deep features; None: every call computes all.
        Raises ConfigError for a level without self-attention, ModelError where XL's inputs are missing.
        """
        images, given = len(x), states
        if perturb_in:
            self.config.check_attention_layers(perturb_in)
        if guidance is not None and self.config.time_cond_proj_dim is None:
            raise ModelError("this U-Net does not know a scale of the guidance (time_cond_proj_dim None)")
        if time_ids is not None:
            time_ids = time_ids.expand(images, -1)
        inputs = (x, timesteps, states, mask, pooled, time_ids, guidance, perturb, *residuals)
        ready = self._ready(cache, states, inputs)
        x, timesteps, states, mask, pooled, time_ids, guidance, perturb, *residuals = ready
        temb = silu(self._embed(x, timesteps, states, mask, pooled, time_ids, guidance, cache), self.training)  # (B, E)
        perturbed = {level: perturb if level in perturb_in else None for level in self.attention_levels}
        context = {level: (states, mask, rows, cache) for level, rows in perturbed.items()}

        if deep is not None:
            x, skips = deep.but_last_level(self, given, self.conv_in(x), temb, context, residuals)
        else:
            x, skips = self.down(self.conv_in(x), temb, context)
            if residuals:
                x, skips = x + residuals[-1], [skip + more for skip, more in zip(skips, residuals)]
            for level in range(len(self.up_blocks) - 1):
                x = self.up(level, x, skips, temb, context)
        x = self.up(len(self.up_blocks) - 1, x, skips, temb, context)
        return self.conv_out(silu(self.conv_norm_out(x), self.training))[:images]

    def up(self, level: int, x: Tensor, skips: list[Tensor], temb: Tensor, context: Mapping[str, tuple]) -> Tensor:
        """One level on the way up, which takes what was handed across from the end of `skips`."""
        block = cast("Level", self.up_blocks[level])
        for resnet, transformer in zip(block.resnets, block.attentions):
            x = self.run(resnet, torch.cat([x, skips.pop()], dim=1), temb)
            x = self.run(transformer, x, *context.get(f"up.{level}", ()))
        # the size is also right where the next skip's is odd
        return block.upsamplers[0](x, skips[-1].shape[-2:]) if hasattr(block, "upsamplers") else x


def load_unet(config: UNetConfig, state: Mapping[str, Tensor], where: object = None) -> UNet:
    """A U-Net in eval mode that holds the tensors of `state` themselves. Raises ModelError where they do not fit."""
    return load_weights(on_meta(lambda: UNet(config)), state, where)
