"""T2I-Adapter: a small network that sees an image of edges, depth, … and steers a U-Net (Mou et al. 2023).

It looks at the image once a run, and what it gives is added to the U-Net's levels on the way down. Module names are
those of diffusers' T2IAdapter.

Shapes:  N images   K channels of an image (1: grey)   C channels of a level   H, W image size
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ConfigError
from ldm.nn.lora import clone_shared_weights
from ldm.nn.unet import UNet
from ldm.nn.unet_config import UNetConfig

KINDS = ("full_adapter", "full_adapter_xl", "light_adapter")


@dataclass(frozen=True)
class T2IAdapterConfig:
    """The settings in diffusers' config.json, with its defaults. Raises ConfigError for values that cannot be."""

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8  # pixels that become channels
    adapter_type: str = "full_adapter"

    def __post_init__(self) -> None:
        if self.adapter_type not in KINDS:
            raise ConfigError(f"adapter_type {self.adapter_type!r:.80} is none of {', '.join(KINDS)}")
        numbers = (self.in_channels, self.num_res_blocks, self.downscale_factor, *self.channels)
        if (
            not self.channels
            or not all(isinstance(n, int) and n > 0 for n in numbers)
            or self.in_channels not in (1, 3)
        ):
            raise ConfigError("in_channels has to be 1 or 3, channels, num_res_blocks and downscale_factor at least 1")

    @property
    def features(self) -> list[tuple[int, int]]:
        """(channels, pixels per side of a cell) of what is added to each level."""
        scale, last = self.downscale_factor, len(self.channels) - 1
        if self.adapter_type == "full_adapter_xl":  # halves the size once
            return [(width, scale * (1 + (i > 1))) for i, width in enumerate(self.channels)]
        found = [(width, scale * 2**i) for i, width in enumerate(self.channels)]
        return found if self.adapter_type == "full_adapter" else [*found, (self.channels[-1], scale * 2 ** (last + 1))]


class FullResnet(nn.Module):
    kernel = 1

    def __init__(self, channels: int):
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, self.kernel, padding=self.kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(F.relu(self.block1(x))) + x


class LightResnet(FullResnet):
    kernel = 3


class FullBlock(nn.Module):
    def __init__(self, channels: int, out: int, layers: int, halves: bool = False):
        super().__init__()
        self.halves = halves
        self.in_conv = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        self.resnets = nn.Sequential(*(FullResnet(out) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets(self.in_conv(halved(x) if self.halves else x))


class LightBlock(nn.Module):
    def __init__(self, channels: int, out: int, layers: int, halves: bool = False):
        super().__init__()
        self.halves = halves
        self.in_conv = nn.Conv2d(channels, out // 4, 1)
        self.resnets = nn.Sequential(*(LightResnet(out // 4) for _ in range(layers)))
        self.out_conv = nn.Conv2d(out // 4, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_conv(self.resnets(self.in_conv(halved(x) if self.halves else x)))


def halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2, ceil_mode=True)  # (N, C, h, w) -> (N, C, h/2, w/2), rounded up as a U-Net does


class Body(nn.Module):
    """From an image with its pixels as channels to a feature for each level."""

    def __init__(self, config: T2IAdapterConfig):
        super().__init__()
        widths, layers = config.channels, config.num_res_blocks
        inputs = config.in_channels * config.downscale_factor**2
        if config.adapter_type == "light_adapter":
            self.conv_in: nn.Module = nn.Identity()
            pairs = zip((inputs, *widths), (*widths, widths[-1]))
            self.body = nn.ModuleList(LightBlock(a, b, layers, i > 0) for i, (a, b) in enumerate(pairs))
            return
        self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        xl = config.adapter_type == "full_adapter_xl"
        self.body = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)] if not xl or i in (1, 2) else width
            self.body.append(FullBlock(before, width, layers, i == 2 if xl else i > 0))

    def forward(self, x: Tensor) -> list[Tensor]:
        x, features = self.conv_in(x), []
        for block in self.body:
            x = block(x)
            features.append(x)
        return features


class T2IAdapter(nn.Module):
    def __init__(self, config: T2IAdapterConfig):
        super().__init__()
        self.config = config
        self.adapter = Body(config)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Images (N, K, H, W) in [0, 1] -> a feature (N, C, h, w) for each level."""
        weight = next(self.parameters())
        return self.adapter(F.pixel_unshuffle(image.to(weight), self.config.downscale_factor))


def places_of(config: UNetConfig, factor: int) -> list[tuple[int, int]]:
    """(channels, pixels per side of a cell) where a U-Net takes features: of each level, then of the middle.

    A level with attention takes them behind its last layer, one without behind its downsampling.
    """
    last, found = len(config.block_out_channels) - 1, []
    for level, width in enumerate(config.block_out_channels):
        later = not config.transformer_layers[level] and level < last
        found.append((width, factor * 2 ** (level + later)))
    return [*found, (config.block_out_channels[-1], factor * 2**last)]


class FeatureInput:
    """A U-Net on the same weights that adds `features` to its levels: set before each call, () for none."""

    def __init__(self, unet: UNet):
        self.unet = clone_shared_weights(unet)
        self.features: Sequence[Tensor] = ()
        for i, place in enumerate(_modules(self.unet)):
            place.register_forward_hook(lambda _module, _inputs, output, i=i: self._added(output, i))

    def _added(self, output: Tensor, i: int) -> Tensor:
        if i >= len(self.features):
            return output
        feature = self.features[i]
        rows = [*range(len(feature)), *[len(feature) - 1] * (len(output) - len(feature))]  # a row that fills up
        return output + (feature if len(output) == len(feature) else feature[rows])


def _modules(unet: Any) -> list[nn.Module]:
    """The modules behind which features are added, as in `places_of`."""
    found = []
    for block in unet.down_blocks:
        attends = isinstance(block.attentions, nn.ModuleList)
        down = getattr(block, "downsamplers", None)
        found.append(block.attentions[-1] if attends else block.resnets[-1] if down is None else down[0])
    return [*found, unet.mid_block.resnets[1]]


def config_of(settings: Mapping[str, Any]) -> T2IAdapterConfig:
    """From diffusers' config.json. Raises ConfigError, TypeError for settings that cannot be."""
    names = T2IAdapterConfig.__dataclass_fields__
    known = {name: value for name, value in settings.items() if name in names and value is not None}
    if "channels" in known:
        known["channels"] = tuple(known["channels"])
    return T2IAdapterConfig(**known)
