"""IP-Adapter: images as prompts, by keys and values of their own beside the text's (Ye et al. 2023).

    attention(q, k, v) + scale * attention(q, k_image, v_image)      in each cross-attention of a U-Net

Module names are those of the original files, so that a checkpoint loads with no key map: `image_proj` makes tokens of
what CLIP's vision tower gives, `ip_adapter` keys and values of tokens.

Shapes:  B batch   N images of one adapter   T tokens of an image   D text width   F width of the tower's features
         L queries   C channels of a layer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attention import attention

HEAD = 64  # channels of a head of the resampler
SIDES = ("down_blocks.", "up_blocks.", "mid_block.")  # the order in which the files number a U-Net's layers

Scale = float | tuple[float, ...]  # of an adapter in a layer: one number, or one for each image with a mask


@dataclass(frozen=True)
class IPAdapterConfig:
    """What the shapes of a file say."""

    kind: str  # plain: of the tower's projected vector; plus and full: of its last layer's tokens but one
    width: int  # D
    features: int  # F
    layers: tuple[int, ...]  # C of each cross-attention of the U-Net, in the files' order
    tokens: int = 4  # T; of full as many as the tower has
    hidden: int = 0  # of plus: width of the resampler,
    inner: int = 0  # of its attention,
    depth: int = 0  # and its layers

    @property
    def pooled(self) -> bool:
        """Whether it reads the projected vector of an image, not its tokens."""
        return self.kind == "plain"


class PlainProjection(nn.Module):
    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        self.proj = nn.Linear(config.features, config.tokens * config.width)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:  # (N, F) -> (N, T, D)
        return self.norm(self.proj(x).unflatten(1, (-1, self.norm.normalized_shape[0])))


class FullProjection(nn.Module):
    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        wide, out = nn.Linear(config.features, config.features), nn.Linear(config.features, config.width)
        self.proj = nn.Sequential(wide, nn.GELU(), out, nn.LayerNorm(config.width))

    def forward(self, x: Tensor) -> Tensor:  # (N, T, F) -> (N, T, D)
        return self.proj(x)


class PerceiverAttention(nn.Module):
    """Learned queries attend to an image's tokens and to themselves (Alayrac et al. 2022)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.num_heads = max(1, inner // HEAD)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:  # (N, S, width), (N, T, width) -> (N, T, width)
        latents = self.norm2(latents)
        k, v = self.to_kv(torch.cat([self.norm1(x), latents], dim=1)).chunk(2, dim=-1)
        return self.to_out(attention(self.to_q(latents), k, v, self.num_heads))


class Resampler(nn.Module):
    """Makes T tokens of all of an image's tokens."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        width = config.hidden
        self.latents = nn.Parameter(torch.randn(1, config.tokens, width) / width**0.5)
        self.proj_in = nn.Linear(config.features, width)
        self.layers: Any = nn.ModuleList()
        for _ in range(config.depth):
            wide, back = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
            feed = nn.Sequential(nn.LayerNorm(width), wide, nn.GELU(), back)
            self.layers.append(nn.ModuleList([PerceiverAttention(width, config.inner), feed]))
        self.proj_out = nn.Linear(width, config.width)
        self.norm_out = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:  # (N, S, F) -> (N, T, D)
        latents, x = self.latents.expand(len(x), -1, -1), self.proj_in(x)
        for attend, feed in self.layers:
            latents = attend(x, latents) + latents
            latents = feed(latents) + latents
        return self.norm_out(self.proj_out(latents))


PROJECTIONS = {"plain": PlainProjection, "plus": Resampler, "full": FullProjection}


class IPAdapter(nn.Module):
    """The weights of one file; `ip_adapter` has a layer's under its number among all attentions: 1, 3, 5, …"""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        self.config = config
        self.image_proj = PROJECTIONS[config.kind](config)
        self.ip_adapter = nn.ModuleDict()
        for i, channels in enumerate(config.layers):
            pair = {name: nn.Linear(config.width, channels, bias=False) for name in ("to_k_ip", "to_v_ip")}
            self.ip_adapter[str(2 * i + 1)] = nn.ModuleDict(pair)


def cross_attentions(unet: nn.Module) -> dict[str, Any]:
    """The cross-attentions of a U-Net by name, in the order in which IP-Adapters number them."""
    found = {name: module for name, module in unet.named_modules() if name.endswith(".attn2")}
    return {name: found[name] for side in SIDES for name in found if name.startswith(side)}


@dataclass(frozen=True)
class Prompted:
    """One adapter at work on a batch."""

    net: IPAdapter
    scales: Mapping[str, Scale]  # beginning of layers' names -> how much it does there
    shown: Sequence[Tensor]  # (N, T, D) of each image of the batch
    unshown: Sequence[Tensor]  # likewise, what stands in their place without guidance
    masks: Sequence[Tensor] | None = None  # (N, H, W) of each, 0 or 1: where each image acts; None: everywhere


class ImageAttention:
    """What adapters add to a U-Net's cross-attentions in one run: TextCache.beside.

    Keys and values of an image are computed for it alone, so that their bits do not depend on the batch.
    """

    def __init__(self, unet: nn.Module, adapters: Sequence[Prompted], latents: tuple[int, int]):
        self._adapters, self._batch = adapters, len(adapters[0].shown)
        layers = cross_attentions(unet)
        self._names = {layer: name for name, layer in layers.items()}
        self._numbers = {name: str(2 * i + 1) for i, name in enumerate(layers)}
        self._scales = [
            {name: next(scale for head, scale in one.scales.items() if name.startswith(head)) for name in layers}
            for one in adapters
        ]
        self._sizes = _sizes(*latents)
        self._unguided = 0  # rows at the beginning that have no prompt
        self._made: dict[tuple, Any] = {}

    def network(self, network: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The U-Net, whose rows are told apart: without the prompt first, then with it."""

        def prompted(x: Tensor, timesteps: Tensor, **more: Any) -> Tensor:
            self._unguided = unguided_rows(len(x), self._batch, more)
            return network(x, timesteps, **more)

        return prompted

    def __call__(self, layer: Any, q: Tensor, mixed: Tensor) -> Tensor:
        """What a layer's attention to the text gave (B, L, C), with the attention to images; q (B, L, C)."""
        name = self._names[layer]
        for i, adapter in enumerate(self._adapters):
            scale = self._scales[i][name]
            if not any(scale if isinstance(scale, tuple) else (scale,)):
                continue
            k, v = self._once((i, name, len(q), self._unguided), partial(self._keys, i, name, len(q)))
            if adapter.masks is None:
                assert not isinstance(scale, tuple)  # as the request was checked
                seen = attention(q, k.flatten(1, 2), v.flatten(1, 2), layer.num_heads, None, layer.backend)
                mixed = mixed + scale * seen
                continue
            masks = self._once((i, q.shape), partial(self._masks, i, q))
            for n in range(k.shape[1]):
                one = scale[n] if isinstance(scale, tuple) else scale
                seen = attention(q, k[:, n].contiguous(), v[:, n].contiguous(), layer.num_heads, None, layer.backend)
                mixed = mixed + one * (seen * masks[:, n])
        return mixed

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _rows(self, rows: int) -> list[tuple[int, bool]]:
        """Of each row its image of the batch, and whether that is shown; a row that fills up is as the last one."""
        own = [(row % self._batch, row >= self._unguided) for row in range(rows - rows % self._batch)]
        return [*own, *[own[-1]] * (rows - len(own))]

    def _keys(self, i: int, name: str, rows: int) -> tuple[Tensor, Tensor]:
        """(keys, values), each (rows, N, T, C)."""
        known: dict[int, Any] = {}
        adapter = self._adapters[i]
        pair: Any = adapter.net.ip_adapter[self._numbers[name]]
        order = [(adapter.shown if shown else adapter.unshown)[image] for image, shown in self._rows(rows)]
        for tokens in order:
            if id(tokens) not in known:
                known[id(tokens)] = tuple(pair[part](tokens) for part in ("to_k_ip", "to_v_ip"))
        k, v = zip(*(known[id(tokens)] for tokens in order))
        return torch.stack(k), torch.stack(v)

    def _masks(self, i: int, q: Tensor) -> Tensor:
        """(rows, N, L, 1) for the queries of a level."""
        masks, size = self._adapters[i].masks, self._sizes[q.shape[1]]
        assert masks is not None
        found = [F.interpolate(mask[:, None], size=size, mode="bicubic").flatten(1)[..., None] for mask in masks]
        return torch.stack([found[image] for image, _ in self._rows(len(q))]).to(q)


def unguided_rows(rows: int, batch: int, inputs: Mapping[str, Any]) -> int:
    """How many rows at the beginning of a network's call have no prompt (see guided_denoiser)."""
    parts = rows // batch - (inputs.get("perturb") is not None)
    return batch if parts == 2 else 0


def _sizes(height: int, width: int) -> dict[int, tuple[int, int]]:
    """Tokens of a level -> its (height, width), of latents in this size."""
    sizes = {}
    while (height * width) not in sizes:
        sizes[height * width] = (height, width)
        height, width = -(-height // 2), -(-width // 2)
    return sizes
