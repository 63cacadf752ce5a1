"""The autoencoder: the one owner of the latents' scale, shift, channels and factor.

Shapes:  B batch   C latent channels   H, W image size   h, w latent size = H / factor, W / factor
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.errors import ConfigError, ModelError, NumericsError
from ldm.nn.tiling import through_tiles
from ldm.nn.weights import load_weights, on_meta

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKL


class VAE:
    """diffusers' AutoencoderKL behind latents of about unit variance: (z - shift_factor) * scaling_factor."""

    def __init__(self, module: AutoencoderKL):
        config: Any = module.config  # a dict by its type, but with attributes
        self.module = module
        self.latent_channels: int = config.latent_channels
        self.factor: int = 2 ** (len(config.block_out_channels) - 1)
        self.scaling_factor: float = config.scaling_factor
        self.shift_factor: float = config.get("shift_factor") or 0.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VAE:
        """A new autoencoder from an AutoencoderKL config.json, with random weights. Raises ModelError."""
        return cls(_build(config))

    @classmethod
    def from_state(cls, config: Mapping[str, Any], state: Mapping[str, Tensor], where: object = None) -> VAE:
        """From config.json and weights, in eval mode. Raises ModelError where they do not fit."""
        old = any(name.endswith(".attentions.0.query.weight") for name in state)
        return cls(load_weights(on_meta(lambda: _build(config)), renamed(state) if old else state, where))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype  # diffusers' own looks at every module: a millisecond

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def to(self, *args, **kwargs) -> VAE:
        """Moves the weights, as Module.to does; returns itself."""
        self.module.to(*args, **kwargs)
        return self

    def moments(self, images: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents of images (B, 3, H, W) in [-1, 1]: two fp32 (B, C, h, w).

        `tile`: in tiles of so many latents a side, where an image is larger (see ldm.nn.tiling).
        Raises ConfigError for sizes that are not multiples of the factor, NumericsError for NaN or infinity.
        """
        self.check_size(*images.shape[-2:])
        images = images.to(self.device, self.dtype)
        if tile is not None and max(images.shape[-2:]) > tile * self.factor:
            tiled = [through_tiles(_mean_and_std, self.module, one, self.factor, 1, tile) for one in images.split(1)]
            mean, std = torch.cat(tiled).chunk(2, dim=1)
        else:
            mean, std = _mean_and_std(self.module, images).chunk(2, dim=1)
        mean = (mean - self.shift_factor) * self.scaling_factor
        std = std * self.scaling_factor
        return _finite(mean, "encoding"), _finite(std, "encoding")

    def encode(self, images: Tensor, generator: torch.Generator | None = None, tile: int | None = None) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w), fp32: their mean, or with a CPU generator a
        draw from their distribution. `tile`, and what is raised, as in `moments`."""
        mean, std = self.moments(images, tile)
        if generator is None:
            return mean
        noise = torch.randn(mean.shape, generator=generator, device=generator.device)
        return mean + std * noise.to(mean.device)

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, H, W), fp32, clamped to [-1, 1]; on a CPU alike in every batch.

        `tile`: in tiles of so many latents a side, where an image is larger (see ldm.nn.tiling). Raises NumericsError
        for NaN or infinity: in 16 bits some autoencoders overflow, and a black image must not pass for a result.
        """
        if latents.shape[1] != self.latent_channels:
            raise ModelError(f"latents have {latents.shape[1]} channels, this VAE decodes {self.latent_channels}")
        z = latents / self.scaling_factor + self.shift_factor
        z = z.to(self.device, self.dtype)
        if tile is not None and max(z.shape[-2:]) > tile:
            images = [through_tiles(_decoded, self.module, one, 1, self.factor, tile) for one in z.split(1)]
        else:
            images = [_decoded(self.module, part) for part in z.split(1 if z.is_cpu else len(z))]
        return _finite(torch.cat(images), "decoding").clamp(-1, 1)

    def check_size(self, height: int, width: int) -> None:
        """Raises ConfigError that names the two nearest sizes where one is not a positive multiple of the factor."""
        for name, size in (("height", height), ("width", width)):
            if size % self.factor or size < self.factor:
                low = size // self.factor * self.factor
                near = " or ".join(str(n) for n in (low, low + self.factor) if n)
                raise ConfigError(f"{name} {size} is not a multiple of {self.factor}", hint=f"use {near}")


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of today: before diffusers 0.18 the middle's attention was called query, key, value."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    result = {}
    for name, tensor in state.items():
        head, _, tail = name.rpartition(".attentions.0.")
        part, _, kind = tail.partition(".")
        if head and part in old:
            name = f"{head}.attentions.0.{old[part]}.{kind}"
            tensor = tensor.flatten(1) if kind == "weight" and tensor.ndim == 4 else tensor  # a 1x1 convolution then
        result[name] = tensor
    return result


def _build(config: Mapping[str, Any]) -> AutoencoderKL:
    from diffusers.models import AutoencoderKL

    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise ModelError(f"the VAE is of class {config['_class_name']}; only AutoencoderKL is supported")
    try:
        return AutoencoderKL.from_config(dict(config))
    except (TypeError, ValueError) as error:
        raise ModelError(f"the VAE's config cannot be used: {error}") from error


def _mean_and_std(module: AutoencoderKL, images: Tensor) -> Tensor:
    """images (B, 3, H, W) -> (B, 2 C, h, w) fp32, unscaled."""
    posterior = module.encode(images).latent_dist
    return torch.cat([posterior.mean.float(), posterior.std.float()], dim=1)


def _decoded(module: AutoencoderKL, z: Tensor) -> Tensor:
    """Unscaled latents (B, C, h, w) -> (B, 3, H, W) fp32."""
    return module.decode(z).sample.float()


def _finite(tensor: Tensor, doing: str) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise NumericsError(f"the VAE gave NaN or infinity in {doing}", hint="try --dtype fp32")
    return tensor
