"""Drawing from pictures: latents to begin at, what a mask keeps, and the second, larger run of hires-fix.

Shapes:  B batch   C latent channels   H, W picture size   h, w latent size   f pixels per latent
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ldm.diffusion.inpaint import Original, blended, with_mask
from ldm.errors import NumericsError
from ldm.images import to_pil, to_tensor
from ldm.nn.tiling import AUTO, TILE

if TYPE_CHECKING:
    from PIL import Image

    from ldm.checkpoint import Model
    from ldm.nn.vae import VAE
    from ldm.pipeline.drawing import ImageRequest, Watch
    from ldm.pipeline.placement import Placement
    from ldm.pipeline.request import Run, Settings


@dataclass(frozen=True)
class Start:
    """What a sampling run begins at beside its noise."""

    original: Original | None = None
    repaint: torch.Tensor | None = None  # (B, 1, h, w) bool and
    masked: torch.Tensor | None = None  # (B, C, h, w): of a model that has channels for them

    def network(self, predict: Callable) -> Callable:
        """`predict`, told of the mask where it wants that."""
        return predict if self.masked is None else with_mask(predict, self.repaint, self.masked)


def begin(model: Model, work: Placement, settings: Settings, pictures: Sequence[ImageRequest]) -> Start:
    """From the pictures' sources: nothing where they have none."""
    sources = [picture.source for picture in pictures]
    if sources[0] is None:
        return Start()
    images, whole = [source.image for source in sources], settings.strength == 1
    with work.on(model.vae) as vae:
        latents = functools.partial(encoded, vae, settings, device=work.device)
        if sources[0].repaint is None:
            return Start(Original(latents(images)))
        repaint = torch.cat([covered(source.repaint, vae.factor) for source in sources]).to(work.device)
        if not inpaints(model):
            return Start(Original(latents(images), repaint, from_noise=whole))
        hidden = {id(source): grey_where(source.image, source.repaint) for source in sources}
        masked = latents([hidden[id(source)] for source in sources])
        return Start(None if whole else Original(latents(images)), repaint, masked)


def inpaints(model: Any) -> bool:
    """Whether a model's U-Net has channels for a mask and the latents of what it does not cover."""
    return model.unet.config.in_channels == 2 * model.vae.latent_channels + 1


def encoded(
    vae: VAE, settings: Settings, images: Sequence[Image.Image | torch.Tensor], device: torch.device
) -> torch.Tensor:
    """Latents (B, C, h, w) fp32, each picture's alone, equal ones once; of one that overflows NaN."""
    known: dict[int, torch.Tensor] = {}
    for image in images:
        if id(image) in known:
            continue
        pixels = image if isinstance(image, torch.Tensor) else to_tensor(image)
        try:
            with torch.no_grad():
                known[id(image)] = vae.encode(pixels, tile=tile(settings, vae, *pixels.shape[-2:])).to(device)
        except NumericsError:  # then its picture is drawn again in fp32
            h, w = (side // vae.factor for side in pixels.shape[-2:])
            known[id(image)] = torch.full((1, vae.latent_channels, h, w), float("nan"), device=device)
    return torch.cat([known[id(image)] for image in images])


def tile(settings: Settings, vae: VAE, height: int, width: int) -> int | None:
    """The side in latents of the tiles that a picture of this size goes through the VAE in; None: all at once."""
    large = height * width > (AUTO * vae.factor) ** 2
    return TILE if (large if settings.vae_tiling is None else settings.vae_tiling) else None


def covered(mask: Image.Image, factor: int) -> torch.Tensor:
    """(1, 1, h, w) bool: latents of which any pixel is to be painted, so that thin strokes are not lost."""
    white = to_tensor(mask)[:, :1] > 0
    return torch.nn.functional.max_pool2d(white.float(), factor) > 0


def grey_where(image: Image.Image, repaint: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) with 0 under the mask, as inpainting models were trained."""
    return to_tensor(image) * (to_tensor(repaint)[:, :1] < 0)


def pasted(images: torch.Tensor, pictures: Sequence[ImageRequest]) -> torch.Tensor:
    """Pictures (B, 3, H, W) with the very pixels of their sources where nothing was to be painted."""
    rows = []
    for image, picture in zip(images, pictures):
        if picture.source is not None and picture.source.repaint is not None and torch.isfinite(image).all():
            keep = to_tensor(picture.source.repaint)[0, :1] < 0
            image = torch.where(keep, to_tensor(picture.source.image)[0], image)
        rows.append(image)
    return torch.stack(rows)


def varied(start: torch.Tensor, pictures: Sequence[ImageRequest]) -> torch.Tensor:
    """First noises (B, C, h, w) on the CPU, blended with that of the variation's seed where a picture has one."""
    rows = []
    for one, picture in zip(start, pictures):
        if picture.variation is not None:
            seed, strength = picture.variation
            other = torch.randn(one.shape, generator=torch.Generator("cpu").manual_seed(seed))
            one = blended(one, other, strength)
        rows.append(one)
    return torch.stack(rows)


def enlarged(
    model: Model,
    work: Placement,
    settings: Settings,
    second: Run,
    pictures: Sequence[ImageRequest],
    images: torch.Tensor,
) -> tuple[list[ImageRequest], Start]:
    """Hires-fix's second run: its pictures, and where it begins: at images (B, 3, H, W) made larger.

    Made larger as pixels, by Lanczos: latents that are stretched are not the latents of a larger picture, and need
    more strength to become some.
    """
    from PIL.Image import Resampling

    height, width = second.height, second.width
    larger = []
    for image in images:
        if torch.isfinite(image).all():
            (small,) = to_pil(image[None])
            larger.append(to_tensor(small.resize((width, height), Resampling.LANCZOS)))
        else:
            larger.append(torch.full((1, 3, height, width), float("nan")))
    with work.on(model.vae) as vae:
        start = Start(Original(encoded(vae, settings, larger, work.device)))
    return [replace(picture, latents=None) for picture in pictures], start


def later(watch: Watch, steps: int) -> Watch:
    """`watch` for a second run, whose steps are counted on from the first's."""
    return lambda i, x, x0: watch(steps + i, x, x0)
