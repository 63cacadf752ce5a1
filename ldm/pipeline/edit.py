"""Drawing from images: latents to begin at, what a mask keeps, and the second, larger run of hires-fix.

Shapes:  B batch   C latent channels   H, W image size   h, w latent size   f pixels per latent
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from ldm.checkpoint import Model
from ldm.diffusion.inpaint import Original, with_mask
from ldm.errors import NumericsError
from ldm.images import to_pil, to_tensor
from ldm.nn.vae import VAE
from ldm.pipeline.placement import Placement
from ldm.pipeline.request import ImageRequest, Run, Settings


@dataclass(frozen=True)
class Start:
    """What a sampling run begins at beside its noise."""

    original: Original | None = None
    mask: torch.Tensor | None = None  # (B, 1, h, w) bool and
    masked: torch.Tensor | None = None  # (B, C, h, w): of a model that has channels for them

    def network(self, network: Callable) -> Callable:
        """`network` with the mask as an input, which it has channels for."""
        assert self.mask is not None and self.masked is not None
        return with_mask(network, self.mask, self.masked)


def encode_init_images(
    model: Model, placement: Placement, settings: Settings, requests: Sequence[ImageRequest]
) -> Start:
    """Where a batch begins, by the initial images and masks of its requests, which all have some."""
    sources = [request.source for request in requests if request.source is not None]
    images, masks = [source.image for source in sources], [source.mask for source in sources if source.mask is not None]
    whole = settings.strength == 1
    with placement.on(model.vae) as vae:
        latents = functools.partial(encode_each, vae, settings, device=placement.device)
        if not masks:
            return Start(Original(latents(images)))
        mask = torch.cat([mask_to_latents(one, vae.factor) for one in masks]).to(placement.device)
        if model.unet.config.in_channels != 2 * vae.latent_channels + 1:
            return Start(Original(latents(images), mask, from_noise=whole))
        hidden = {id(source): grey_where(source.image, one) for source, one in zip(sources, masks)}
        masked = latents([hidden[id(source)] for source in sources])
        return Start(None if whole else Original(latents(images)), mask, masked)


def enlarge(model: Model, placement: Placement, settings: Settings, run: Run, images: torch.Tensor) -> Start:
    """Where hires-fix's second run begins: at images (B, 3, H, W), made as large as the run is.

    They are enlarged as pixels, by Lanczos: stretched latents are not the latents of a larger image, and need more
    strength to become some.
    """
    larger = [_resize(image, run.height, run.width) for image in images.split(1)]
    with placement.on(model.vae) as vae:
        return Start(Original(encode_each(vae, settings, larger, placement.device)))


def _resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(1, 3, H, W) in another size; NaN where it is not finite."""
    try:
        (small,) = to_pil(image)
    except NumericsError:
        return torch.full((1, 3, height, width), float("nan"))
    return to_tensor(small.resize((width, height), Image.Resampling.LANCZOS))


def encode_each(
    vae: VAE, settings: Settings, images: Sequence[Image.Image | torch.Tensor], device: torch.device
) -> torch.Tensor:
    """Latents (B, C, h, w) fp32, each image encoded alone and equal ones once; NaN where encoding overflows."""
    known: dict[int, torch.Tensor] = {}
    for image in images:
        if id(image) in known:
            continue
        pixels = image if isinstance(image, torch.Tensor) else to_tensor(image)
        try:
            known[id(image)] = vae.encode(pixels, tile=settings.tile(vae.factor, *pixels.shape[-2:])).to(device)
        except NumericsError:  # then its image is drawn again in fp32
            h, w = (side // vae.factor for side in pixels.shape[-2:])
            known[id(image)] = torch.full((1, vae.latent_channels, h, w), float("nan"), device=device)
    return torch.cat([known[id(image)] for image in images])


def mask_to_latents(mask: Image.Image, factor: int) -> torch.Tensor:
    """(1, 1, h, w) bool: True for latents with any pixel that is painted, so that thin strokes are not lost."""
    white = to_tensor(mask)[:, :1] > 0
    return torch.nn.functional.max_pool2d(white.float(), factor) > 0


def grey_where(image: Image.Image, mask: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) with 0 under the mask, as inpainting models were trained."""
    return to_tensor(image) * (to_tensor(mask)[:, :1] < 0)


def composite(images: torch.Tensor, requests: Sequence[ImageRequest]) -> torch.Tensor:
    """Images (B, 3, H, W) with the very pixels of their sources where nothing was to be painted."""
    rows = []
    for image, request in zip(images, requests):
        if request.source is not None and request.source.mask is not None:
            keep = to_tensor(request.source.mask)[0, :1] < 0
            image = torch.where(keep, to_tensor(request.source.image)[0], image)
        rows.append(image)
    return torch.stack(rows)
