"""ControlNet: a second encoder that sees an image of edges, depth, … and steers a U-Net (Zhang et al. 2023).

It is the U-Net's own way down and middle, with the image's embedding added behind the first convolution, and a 1x1
convolution that begins as zeros before each output. Module names follow diffusers' ControlNetModel.

Shapes:  B batch   N images, of which B is a multiple   H, W latent size   f pixels per latent
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ConfigError, ModelError
from ldm.nn.attention import TextCache, remember
from ldm.nn.batch_invariant import Pointwise, in_blocks, pad_to_even_batch, silu
from ldm.nn.unet import Encoder, UNet, UNetConfig
from ldm.nn.weights import load_weights, on_meta

ORDERS = ("rgb", "bgr")
# A ControlNet's own settings in diffusers' config.json, with its defaults
OWN: dict[str, Any] = {
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": (16, 32, 96, 256),
    "controlnet_conditioning_channel_order": "rgb",
    "global_pool_conditions": False,
    "unet_block_out_channels": None,  # ours alone: of the U-Net, where these levels are narrower
}
NOT_ITS: tuple[str, ...] = ("out_channels", "sample_size", "up_block_types")  # of a U-Net's settings
# What UNet2DConditionModel has settings for and ControlNetModel has not
NOT_ITS += ("center_input_sample", "conv_in_kernel", "conv_out_kernel", "attention_type", "class_embeddings_concat")
NOT_ITS += ("cross_attention_norm", "dropout", "dual_cross_attention", "mid_block_only_cross_attention")
NOT_ITS += ("resnet_out_scale_factor", "resnet_skip_time_act", "reverse_transformer_layers_per_block")
NOT_ITS += ("time_cond_proj_dim", "time_embedding_act_fn", "time_embedding_dim", "time_embedding_type")
NOT_ITS += ("timestep_post_act",)


@dataclass(frozen=True)
class ControlNetConfig:
    """A U-Net's settings and those of the image's embedding. Raises ConfigError for values that cannot be."""

    unet: UNetConfig  # of the base model; in_channels is that of the latents alone
    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)  # each but the first halves the size
    channel_order: str = "rgb"  # or bgr: what it was trained on
    global_pool_conditions: bool = False  # outputs are averaged over the image, as "shuffle" was trained
    unet_block_out_channels: tuple[int, ...] | None = None  # the base's widths, where `unet` has others: see `of_unet`

    def __post_init__(self) -> None:
        if self.channel_order not in ORDERS:
            raise ConfigError(
                f"controlnet_conditioning_channel_order {self.channel_order!r:.80} is neither rgb nor bgr"
            )
        widths = self.conditioning_embedding_out_channels
        if not widths or min(widths) < 1 or self.conditioning_channels < 1:
            raise ConfigError("conditioning_channels and conditioning_embedding_out_channels have to be at least 1")
        if len(self.outputs) != len(self.unet.block_out_channels) or min(self.outputs) < 1:
            what = f"{self.outputs} are not one width for each of {len(self.unet.block_out_channels)} levels"
            raise ConfigError(what, where="unet_block_out_channels")

    @property
    def outputs(self) -> tuple[int, ...]:
        """The widths of the base's levels, which its outputs have."""
        return self.unet_block_out_channels or self.unet.block_out_channels

    @property
    def factor(self) -> int:
        """Pixels per latent."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    @classmethod
    def of_unet(
        cls,
        unet: UNetConfig,
        factor: int = 8,
        channels: int = 4,
        widths: Sequence[int] | None = None,
        embedding: Sequence[int] | None = None,
    ) -> ControlNetConfig:
        """Of a ControlNet for a U-Net with these settings, `factor` pixels per latent and latents of `channels`.

        widths: of its levels where they are not the U-Net's, with groups and heads that divide them: a smaller
        ControlNet, which diffusers cannot load. embedding: widths of the image's embedding, each but the first of which
        halves the size (16, 32, 96, 256, …). Raises ConfigError for lengths that do not fit.
        """
        settings = {**unet.to_diffusers(), "in_channels": channels, "time_cond_proj_dim": None}
        wide = unet.block_out_channels
        if widths is not None and tuple(widths) != wide:
            if len(widths) != len(wide) or min(widths) < 1:
                raise ConfigError(f"{list(widths)} are not one width for each of the U-Net's {len(wide)} levels")
            heads = [math.gcd(heads, width) for heads, width in zip(unet.num_heads, widths)]
            groups = math.gcd(unet.norm_num_groups, *widths)
            narrow = {"block_out_channels": list(widths), "norm_num_groups": groups, "attention_head_dim": heads}
            settings |= narrow
        usual = [16, 32, 96, *[256] * factor.bit_length()][: factor.bit_length()]
        made = cls(
            UNetConfig.from_diffusers(settings),
            3,
            tuple(usual if embedding is None else embedding),
            unet_block_out_channels=wide if tuple(settings["block_out_channels"]) != wide else None,
        )
        if made.factor != factor:
            steps = factor.bit_length()
            raise ConfigError(f"an image's embedding of {factor} pixels per latent has {steps} widths, not {embedding}")
        return made

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any], where: object = None) -> ControlNetConfig:
        """From the config.json of a ControlNetModel. Raises ModelError, ConfigError as the U-Net's settings do."""
        own = {**OWN, **{key: value for key, value in config.items() if key in OWN and value is not None}}
        rest = {key: value for key, value in config.items() if key not in OWN}
        if "down_block_types" in rest:
            rest["up_block_types"] = [str(kind).replace("Down", "Up") for kind in reversed(rest["down_block_types"])]
        return cls(
            UNetConfig.from_diffusers(rest, where),
            own["conditioning_channels"],
            tuple(own["conditioning_embedding_out_channels"]),
            own["controlnet_conditioning_channel_order"],
            bool(own["global_pool_conditions"]),
            tuple(wide) if (wide := own["unet_block_out_channels"]) is not None else None,
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The config.json of a ControlNetModel with the same weights; with narrower levels, ours alone."""
        shared = {key: value for key, value in self.unet.to_diffusers().items() if key not in NOT_ITS}
        values = (self.conditioning_channels, list(self.conditioning_embedding_out_channels))
        own = dict(zip(OWN, (*values, self.channel_order, self.global_pool_conditions)))
        narrow = {} if (wide := self.unet_block_out_channels) is None else {"unet_block_out_channels": list(wide)}
        return {**shared, **own, **narrow, "_class_name": "ControlNetModel"}


class ConditionEmbedding(nn.Module):
    """Brings an image to the size and width of the U-Net's first level."""

    def __init__(self, config: ControlNetConfig):
        super().__init__()
        widths, out = config.conditioning_embedding_out_channels, config.unet.block_out_channels[0]
        self.conv_in = nn.Conv2d(config.conditioning_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in itertools.pairwise(widths):
            self.blocks.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, stride=2, padding=1))
        self.conv_out = zeroed(nn.Conv2d(widths[-1], out, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:  # (N, 3, f H, f W) -> (N, C, H, W)
        h = F.silu(self.conv_in(image))
        for layer in self.blocks:
            h = F.silu(layer(h))
        return self.conv_out(h)


def skip_widths(widths: Sequence[int], layers: int) -> list[int]:
    """The channels of what a U-Net with levels of these widths hands across, from the highest resolution down."""
    levels = [[width] * (layers + 1) for width in widths]  # its resnets, and what makes it smaller
    return [widths[0], *itertools.chain(*levels)][:-1]  # the last level is made no smaller


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer that begins as zeros, so that training begins with what the U-Net can do."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ControlNet(Encoder):
    """Gives what is added to a U-Net's skips and middle, in eval mode with the same bits in every batch."""

    def __init__(self, config: ControlNetConfig):
        super().__init__(config.unet)
        self.control = config
        self.controlnet_cond_embedding = ConditionEmbedding(config)
        outputs = skip_widths(config.outputs, config.unet.layers_per_block)
        widths = zip(self.skip_channels, outputs, strict=True)
        self.controlnet_down_blocks = nn.ModuleList(zeroed(Pointwise(own, wide)) for own, wide in widths)
        self.controlnet_mid_block = zeroed(Pointwise(self.skip_channels[-1], outputs[-1]))

    @classmethod
    def from_unet(
        cls,
        unet: UNet,
        factor: int = 8,
        channels: int = 4,
        widths: Sequence[int] | None = None,
        embedding: Sequence[int] | None = None,
    ) -> ControlNet:
        """One to be trained for a U-Net: with copies of its weights, zeros at its ends.

        `factor`: pixels per latent, a power of 2; `channels`: of the latents, of an inpainting U-Net's the first ones.
        `widths`, `embedding`: see ControlNetConfig.of_unet; levels of other widths begin with random weights.
        """
        net = cls(ControlNetConfig.of_unet(unet.config, factor, channels, widths, embedding))
        if net.control.unet_block_out_channels is None:
            state, own = unet.state_dict(), net.state_dict()
            state["conv_in.weight"] = state["conv_in.weight"][:, :channels]
            net.load_state_dict({**own, **{name: state[name] for name in own if name in state}})
        return net

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        states: Tensor,
        *,
        image: Tensor | Sequence[Tensor],
        scale: float | Sequence[float] = 1.0,
        guess: bool = False,
        mask: Tensor | None = None,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        cache: TextCache | None = None,
    ) -> list[Tensor]:
        """The U-Net's inputs and image (N, 3, f H, f W) in [0, 1] -> its `residuals`.

        N divides B: rows of several conditions have the images in the same order. scale: how much of the outputs.
        A ControlNet Union takes a list of images, one for each of its kinds, and a scale for each.
        guess: outputs grow from a tenth at the highest resolution to the whole in the middle.
        """
        rows = len(x)
        if time_ids is not None:
            time_ids = time_ids.expand(rows, -1)
        inputs = self._ready(cache, states, (x, timesteps, states, mask, pooled, time_ids))
        x, timesteps, states, mask, pooled, time_ids = inputs
        embedded, scale = self._embed_images(image, scale, x, rows, cache)
        temb = silu(self._embed(x, timesteps, states, mask, pooled, time_ids, None, cache), self.training)
        context = dict.fromkeys(self.attention_levels, (states, mask, None, cache))
        middle, skips = self.down(self.conv_in(x) + embedded, temb, context)
        layers = (*self.controlnet_down_blocks, self.controlnet_mid_block)
        outputs = [layer(h)[:rows] for layer, h in zip(layers, (*skips, middle), strict=True)]
        if self.control.global_pool_conditions:
            return [output.mean(dim=(2, 3), keepdim=True) * scale for output in outputs]
        factors = torch.logspace(-1, 0, len(outputs)).tolist() if guess else [1.0] * len(outputs)
        return [output * (factor * scale) for output, factor in zip(outputs, factors)]

    def _embed_images(
        self, image: Any, scale: Any, x: Tensor, rows: int, cache: TextCache | None
    ) -> tuple[Tensor, float]:
        """(what is added to the first convolution of x, how much of the outputs counts)."""
        made = remember(
            cache,
            self.controlnet_cond_embedding,
            lambda: self._for_rows(self._embed_image(self._embed_condition, image, x, rows), rows),
        )
        return made, scale

    def _embed_condition(self, image: Tensor) -> Tensor:  # (N, 3, f H, f W) -> (N, C, H, W)
        return self.controlnet_cond_embedding(image)

    def _embed_image(self, embed: Callable[[Tensor], Tensor], image: Tensor, x: Tensor, rows: int) -> Tensor:
        """`embed` of images (N, 3, f H, f W) that go with the first `rows` rows of x -> (N, C, H, W)."""
        size = tuple(side * self.control.factor for side in x.shape[2:])
        if tuple(image.shape[2:]) != size or rows % len(image):
            raise ModelError(f"ControlNet: images {tuple(image.shape)} do not fit latents {tuple(x.shape)}")
        image = image.flip(1) if self.control.channel_order == "bgr" else image
        return self._alike(embed, image.to(x.dtype))

    def _alike(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """function(x) with the same bits for an image in every batch, where these are promised."""
        return function(x) if self.training or not x.is_cpu else in_blocks(function, x, 2)

    def _for_rows(self, embedded: Tensor, rows: int) -> Tensor:
        """Of N images (N, C, H, W) -> of `rows` rows, and of the one that fills them up."""
        embedded = embedded.repeat(rows // len(embedded), 1, 1, 1)
        return embedded if self.training else pad_to_even_batch(embedded)[0]


def load_controlnet(config: ControlNetConfig, state: Mapping[str, Tensor], where: object = None) -> ControlNet:
    """A ControlNet in eval mode with the tensors of `state` themselves. Raises ModelError where they do not fit."""
    return load_weights(on_meta(lambda: ControlNet(config)), state, where)


def summed(residuals: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The residuals of several ControlNets as one."""
    first, *others = residuals
    total = list(first)
    for other in others:
        total = [a + b for a, b in zip(total, other, strict=True)]
    return total
