"""One batch of pictures, from texts and seeds to pixels: an ImageRequest holds what differs inside it.

Shapes:  B batch   C latent channels   H, W picture size   h, w latent size
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ldm.device import is_out_of_memory
from ldm.errors import NumericsError, ResourceError

if TYPE_CHECKING:
    import torch

    from ldm.checkpoint import Model
    from ldm.nn.unet import UNet
    from ldm.nn.vae import VAE
    from ldm.pipeline.adapters import Adapter
    from ldm.pipeline.edit import Start
    from ldm.pipeline.encode import Encoder
    from ldm.pipeline.placement import Placement
    from ldm.pipeline.request import Run, Settings
    from ldm.pipeline.sources import Source

# called as (i, x, x0) after step i of a batch, x and x0 (B, C, h, w)
Watch = Callable[[int, "torch.Tensor", "torch.Tensor"], Any]


@dataclass(frozen=True)
class ImageRequest:
    """One picture to draw: its bits are the same whatever is drawn beside it."""

    prompt: str  # without its LoRA tags
    negative_prompt: str | None
    seed: int
    guidance_scale: float
    adapters: tuple[Adapter, ...] = ()
    latents: torch.Tensor | None = None  # (C, h, w): unit noise in place of the seed's
    variation: tuple[int, float] | None = None  # (another seed, how far its noise is mixed in, 0 to 1)
    source: Source | None = None  # the picture that it begins at, in the size that is drawn

    @property
    def texts(self) -> tuple[str, str | None]:
        """What is encoded: the prompt, and the negative one where it is looked at."""
        return self.prompt, self.negative_prompt if self.guidance_scale > 1 else ""

    @property
    def begins(self) -> tuple[bool, bool]:
        """Whether at a picture, and whether that has a mask: equal for all of a batch."""
        return self.source is not None, self.source is not None and self.source.repaint is not None


def batches(pictures: Sequence[ImageRequest], text: Any, settings: Settings, size: int) -> list[list[int]]:
    """Which pictures are drawn together: at most `size`, under the same LoRAs and with texts of as many chunks.

    Those that begin at a picture are apart from the others, those with a mask too.
    """
    from ldm.pipeline.encode import chunks_needed

    @functools.cache
    def chunks(texts: tuple[str, str | None]) -> tuple[int, ...]:
        return tuple(chunks_needed(text, texts, run.steps) for run in settings.runs)

    groups: dict[tuple, list[int]] = {}
    for row, picture in enumerate(pictures):
        groups.setdefault((picture.adapters, picture.begins, chunks(picture.texts)), []).append(row)
    return [rows[i : i + size] for rows in groups.values() for i in range(0, len(rows), size)]


def draw(
    model: Model, work: Placement, encode: Encoder, settings: Settings, pictures: Sequence[ImageRequest], watch: Watch
) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] on the CPU; one that is not finite is NaN as a whole.

    Raises ResourceError out of memory, with nothing held.
    """
    from ldm.pipeline.edit import begin, enlarged, later, pasted

    with out_of_memory(settings, len(pictures)):
        first, *more = settings.runs
        begun = begin(model, work, settings, pictures)
        images = draw_once(model, work, encode, settings, first, pictures, watch, begun)
        for second in more:
            pictures, begun = enlarged(model, work, settings, second, pictures, images)
            watch = later(watch, first.steps)
            images = draw_once(model, work, encode, settings, second, pictures, watch, begun)
        return pasted(images, pictures)


def draw_once(
    model: Model,
    work: Placement,
    encode: Encoder,
    settings: Settings,
    run: Run,
    pictures: Sequence[ImageRequest],
    watch: Watch,
    begun: Start,
) -> torch.Tensor:
    """One sampling run of a batch, from its texts, its noise and what it begins at: pictures (B, 3, H, W), decoded."""
    from ldm.pipeline.edit import tile
    from ldm.pipeline.encode import chunks_needed

    prompts, negatives = zip(*(picture.texts for picture in pictures))
    steps = run.steps
    chunks = chunks_needed(model.text, pictures[0].texts, steps)  # as many for all of a batch
    guided = any(picture.guidance_scale > 1 for picture in pictures)
    cond = encode.over(prompts, steps, chunks)
    uncond = encode.over(negatives, steps, chunks) if guided else None
    latents = denoise(model, work, settings, run, pictures, cond, uncond, watch, begun)
    with work.on(model.vae) as vae:
        return decode(vae, latents, tile(settings, vae, run.height, run.width))


def denoise(
    model: Model,
    work: Placement,
    settings: Settings,
    run: Run,
    pictures: Sequence[ImageRequest],
    cond: Any,
    uncond: Any,
    watch: Watch,
    begun: Start,
) -> torch.Tensor:
    """From the first noise to latents (B, C, h, w); what the U-Net was lent ends with this call."""
    from ldm.diffusion.guidance import guide
    from ldm.diffusion.sampling import sample

    s, schedule = settings, model.schedule
    noise, start = starting_noise(model.vae, work.device, run, pictures)
    guidance = replace(s.guidance, scale=tuple(picture.guidance_scale for picture in pictures))
    with work.on(model.unet) as unet:
        predict = guide(begun.network(network(unet, run)), cond, uncond, guidance, schedule, run.sigmas)
        own = {"spacing": s.spacing, "eta": s.eta, "dtype": model.dtype, "callback": watch}
        return sample(predict, schedule, run.sigmas, start, s.sampler, noise=noise, original=begun.original, **own)


def network(unet: UNet, run: Run) -> Callable:
    """The U-Net as predict(x, timesteps, cond); XL's is told of a picture that was this large and is not cropped."""
    h, w = run.height, run.width
    sizes = (h, w, 0, 0, h, w) if unet.config.addition_embed_type == "text_time" else None  # original, crop, target

    last: Any = None  # the texts of the call before, and what the U-Net made of them
    texts: Any = None

    def predict(x, timesteps, cond, **perturbed):
        nonlocal last, texts
        if cond is not last:
            last, texts = cond, unet.prepare(cond.states, cond.mask)
        time_ids = None if sizes is None else timesteps.new_tensor([sizes] * len(x))
        return unet(x, timesteps, texts, pooled=cond.pooled, time_ids=time_ids, **perturbed)

    return predict


def starting_noise(
    vae: VAE, device: torch.device, run: Run, pictures: Sequence[ImageRequest]
) -> tuple[Callable, torch.Tensor]:
    """(the sampler's noise, the first noise (B, C, h, w)): from the pictures' seeds, or the latents that they bring."""
    import torch

    from ldm.pipeline.edit import varied
    from ldm.pipeline.encode import Noise

    shape = (vae.latent_channels, run.height // vae.factor, run.width // vae.factor)
    noise = Noise([picture.seed for picture in pictures], shape, device)
    if all(picture.latents is None for picture in pictures):
        start = noise().cpu()
    else:
        start = torch.stack([picture.latents for picture in pictures]).cpu().float()
    return noise, varied(start, pictures).to(device)


def decode(vae: VAE, latents: torch.Tensor, tile: int | None = None) -> torch.Tensor:
    """Latents (B, C, h, w) -> pictures (B, 3, H, W) on the CPU; a picture that is not finite becomes NaN as a whole."""
    import torch

    images = []
    for one in latents.split(1):
        try:
            with torch.no_grad():
                images.append(vae.decode(one, tile).float().cpu())
        except NumericsError:  # one picture's failure is not the batch's
            h, w = one.shape[2:]
            images.append(torch.full((1, 3, h * vae.factor, w * vae.factor), float("nan")))
    return torch.cat(images)


@contextmanager
def out_of_memory(settings: Settings, batch: int) -> Iterator[None]:
    """Turn running out of memory into ResourceError, after what the failed batch held is let go."""
    import torch

    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    todo = f"use a smaller batch_size than {batch}" if batch > 1 else "use a smaller size or a smaller dtype"
    raise ResourceError(f"out of memory at {batch} x {settings.width}x{settings.height}", todo=todo)
