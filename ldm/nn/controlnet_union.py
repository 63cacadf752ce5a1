"""ControlNet Union: one ControlNet for many kinds of condition, which is told the kind (xinsir's, for XL).

The kind is a learned vector that joins the mean of the image's embedding, goes through a small transformer and is added
to the embedding; and it is added to the time embedding as a row of zeros and a one. Module names follow diffusers'
ControlNetUnionModel.

Several images of different kinds go into one call: what is made of each is weighed by its scale and added up, and the
kinds' row has several ones.

In diffusers the small transformer attends along the batch, whose rows are the same for one image, so that its
attention is the mean of equal values. Here each row attends to itself, and no image depends on the others; in neither
do the kinds of one image see each other.

Shapes:  B rows   N images   C width of the first level   T kinds   E time embedding
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ConfigError
from ldm.nn.attention import TextCache, remember
from ldm.nn.controlnet import ControlNet, ControlNetConfig
from ldm.nn.unet import TimestepEmbedding, sinusoidal

# Its own settings in diffusers' config.json, with its defaults
OWN = {"num_control_type": 6, "num_trans_channel": 320, "num_trans_head": 8, "num_trans_layer": 1}
OWN |= {"num_proj_channel": 320}


@dataclass(frozen=True)
class ControlNetUnionConfig:
    """A ControlNet's settings and those of the kinds. Raises ConfigError for values that cannot be."""

    control: ControlNetConfig
    kinds: int = 6  # T
    heads: int = 8
    layers: int = 1

    def __post_init__(self) -> None:
        if self.kinds < 1 or self.layers < 1 or self.control.unet.addition_time_embed_dim is None:
            raise ConfigError("num_control_type, num_trans_layer and addition_time_embed_dim have to be at least 1")

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any], where: object = None) -> ControlNetUnionConfig:
        """From the config.json of a ControlNetUnionModel. Raises ModelError, ConfigError."""
        own = {**OWN, **{key: value for key, value in config.items() if key in OWN and value is not None}}
        shared = {"conditioning_embedding_out_channels": (48, 96, 192, 384), **config}
        control = ControlNetConfig.from_diffusers({k: v for k, v in shared.items() if k not in OWN}, where)
        width = control.unet.block_out_channels[0]
        if {own["num_trans_channel"], own["num_proj_channel"]} != {width}:
            raise ConfigError(
                f"num_trans_channel and num_proj_channel have to be {width}, as block_out_channels begins"
            )
        return cls(control, own["num_control_type"], own["num_trans_head"], own["num_trans_layer"])


class KindBlock(nn.Module):
    """A layer of CLIP's, of which a row attends to itself alone."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:  # (N, C) -> (N, C)
        weight, bias = (t.chunk(3)[2] for t in (self.attn.in_proj_weight, self.attn.in_proj_bias))
        x = x + self.attn.out_proj(F.linear(self.ln_1(x), weight, bias))  # the softmax of one score is 1
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))


class ControlNetUnion(ControlNet):
    """As a ControlNet; `in_modes` gives one that is told the kinds of its images."""

    def __init__(self, config: ControlNetUnionConfig):
        super().__init__(config.control)
        unet, width = config.control.unet, config.control.unet.block_out_channels[0]
        assert unet.addition_time_embed_dim is not None  # as its settings have checked
        self.union = config
        self.modes: tuple[int, ...] = (0,)  # the kind of each image
        self.task_embedding = nn.Parameter(torch.randn(config.kinds, width) * width**0.5)
        self.transformer_layes = nn.ModuleList(KindBlock(width, config.heads) for _ in range(config.layers))
        self.spatial_ch_projs = nn.Linear(width, width)
        self.control_add_embedding = TimestepEmbedding(unet.addition_time_embed_dim * config.kinds, 4 * width)

    def in_modes(self, modes: Sequence[int]) -> ControlNetUnion:
        """This network, told the kind of each of its images; all modules are shared."""
        told = copy.copy(self)
        told.modes = tuple(modes)
        return told

    def _embed_images(
        self, image: Any, scale: Any, x: Tensor, rows: int, cache: TextCache | None
    ) -> tuple[Tensor, float]:
        """As a ControlNet's; of several images the sum, each by its scale, and then the outputs count whole."""
        if isinstance(image, Tensor):
            return super()._embed_images(image, scale, x, rows, cache)
        embed = self.controlnet_cond_embedding
        plain = remember(cache, embed, lambda: [self._embed_image(embed, one, x, rows) for one in image])
        total = torch.zeros_like(plain[0])
        for one, mode, much in zip(plain, self.modes, scale, strict=True):
            if much:
                means = torch.stack([condition.contiguous().mean(dim=(1, 2)) for condition in one])  # of each alone
                kind = self._alike(partial(self._embed_kind, mode=mode, scale=much), means)
                total = total + (one * much + kind[:, :, None, None])
        return self._for_rows(total, rows), 1.0

    def _embed_condition(self, image: Tensor) -> Tensor:
        condition = super()._embed_condition(image)
        return condition + self._embed_kind(condition.mean(dim=(2, 3)), self.modes[0])[:, :, None, None]

    def _embed_kind(self, means: Tensor, mode: int, scale: float = 1.0) -> Tensor:
        """What a kind adds to an embedding whose means are (N, C), weighed as diffusers does -> (N, C)."""
        h = (means + self.task_embedding[mode]) * scale
        for layer in self.transformer_layes:
            h = layer(h)
        return self.spatial_ch_projs(h) * scale

    def _embed(self, x: Tensor, timesteps: Tensor, *context: Any) -> Tensor:
        temb, cache = super()._embed(x, timesteps, *context), context[-1]
        return temb + remember(cache, self.control_add_embedding, partial(self._embed_mode, x.device, x.dtype))

    def _embed_mode(self, device: torch.device, dtype: torch.dtype) -> Tensor:  # -> (1, E)
        kinds = F.one_hot(torch.tensor(self.modes, device=device), self.union.kinds).amax(dim=0)
        width = self.control.unet.addition_time_embed_dim
        assert width is not None
        return self.control_add_embedding(sinusoidal(kinds, width).flatten()[None].to(dtype))
