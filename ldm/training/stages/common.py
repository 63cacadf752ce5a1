"""What the stages share: noise levels, validation and sample grids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ldm.console import say
from ldm.device import sent
from ldm.diffusion.denoiser import Denoise, Predict, sample, training_loss, training_losses, x0_error
from ldm.diffusion.schedule import Schedule
from ldm.nn.mmdit_config import MMDiTConfig
from ldm.nn.text import Conditioning
from ldm.nn.tiling import AUTO, TILE
from ldm.nn.unet_config import UNetConfig
from ldm.nn.vae import VAE
from ldm.training.data import Batch, ImageDataset
from ldm.training.distributed import RowShard, current
from ldm.training.loop import seeded
from ldm.training.loop.error_weights import ErrorWeights
from ldm.training.loop.seeded import AHEAD
from ldm.training.settings import DistillSettings, FinetuneSettings, UNetSettings

FEWEST = 32  # pairs of held-out image and noise level that the validation loss is a mean of
Network = Callable[[Tensor, Tensor, Conditioning], Tensor]  # (x (B, C, h, w), timesteps (B,), texts) -> raw


def networks_of(module: nn.Module) -> dict[str, nn.Module]:
    """The networks that are trained, by name: the U-Net alone, or a ModuleDict with its text encoders."""
    return dict(module.items()) if isinstance(module, nn.ModuleDict) else {"unet": module}


def conditioned(
    unet: Callable[..., Tensor],
    time_ids: tuple[float, ...] | Tensor | None = None,
    guidance: Tensor | None = None,
) -> Network:
    """A U-Net or flow transformer as network(x, timesteps, cond).

    XL's is told `time_ids`, (B, 6) or the same six for every image. guidance (B,): the scale, of one that has it as an
    input.
    """
    more = {} if guidance is None else {"guidance": guidance}

    def network(x: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        ids = x.new_tensor([time_ids] * len(x)) if isinstance(time_ids, tuple) else time_ids
        sizes = {} if ids is None else {"time_ids": ids}
        return unet(x, timesteps, cond.states, mask=cond.mask, pooled=cond.pooled, **sizes, **more)

    return network


def square_ids(side: int, device: torch.device) -> Tensor:
    """What XL is told of a whole square image, (6,): its original size, its crop, its target size."""
    return torch.tensor((side, side, 0.0, 0.0, side, side), device=device)


def shape_timesteps(u: Tensor, timesteps: str, shift: float) -> Tensor:
    """Uniform (B,) in [0, 1) → [0, 1), as often at low and at high noise as the settings say."""
    if timesteps == "logit_normal":
        u = torch.sigmoid(torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6))).float()
    return shift * u / (1 + (shift - 1) * u)  # Esser et al. 2024, eq. 23


def model_shift(schedule: Schedule, config: UNetConfig | MMDiTConfig, latents: Tensor) -> float:
    """The shift that a flow model is drawn with: for some a function of the tokens of latents (B, C, h, w)."""
    patch = config.patch_size if isinstance(config, MMDiTConfig) else 1
    height, width = latents.shape[-2:]
    return schedule.shift_at((height // patch) * (width // patch))


def timesteps_at(schedule: Schedule, u: Tensor) -> Tensor:
    """(B,) in [0, 1) → timesteps of the schedule."""
    if schedule.is_flow:
        return u.clamp(1e-4, 1 - 1e-4)
    total = schedule.num_train_timesteps
    return (u * total).long().clamp(max=total - 1)


def fixed_levels(count: int, seed: int) -> Tensor:
    """(count,) in (0, 1), one from each of `count` equal parts, in an order that is always the same."""
    order = torch.randperm(count, generator=seeded.generator(seed, "validation order"))
    return ((torch.arange(count) + 0.5) / count)[order]


def noise_and_levels(
    settings: UNetSettings | FinetuneSettings | DistillSettings, batch: Batch, step: int, micro: int, kind: str = ""
) -> tuple[Tensor, Tensor]:
    """For the rows of all processes: noise (B, C, h, w), and draws (B,) in [0, 1), one from each of as many parts."""
    s, x0, size = settings, batch.latents, batch.part.size
    shape, draw, at = (size, *x0.shape[1:]), (s.seed, f"{kind}noise"), (step, micro)
    if x0.is_cpu:  # where a thread would take from the others
        noise = seeded.normal(shape, *draw, *at)
    else:
        later = divmod(step * s.accumulation + micro + 1, s.accumulation)
        noise = AHEAD[kind].normal(shape, (*draw, *at), (*draw, *later))
    if s.noise_offset:
        shift = seeded.normal((size, x0.shape[1], 1, 1), s.seed, f"{kind}noise offset", step, micro)
        noise = noise + s.noise_offset * shift
    u = (torch.arange(size) + seeded.uniform((size,), s.seed, f"{kind}timesteps", step, micro)) / size
    return noise, u


def diffusion_loss(
    predict: Predict,
    schedule: Schedule,
    settings: UNetSettings | FinetuneSettings | DistillSettings,
    batch: Batch,
    step: int,
    micro: int,
    kind: str = "",  # "prior " for its batches, whose draws are others
    teacher: Predict | None = None,
    contrast: float = 0.0,
    weights: ErrorWeights | None = None,
    shift: float = 1.0,  # of the noise levels, where the settings leave it to the model
) -> Tensor:
    """The mean loss of a batch, a scalar; noise and noise levels are keyed by (seed, step, micro)."""
    s, x0, part = settings, batch.latents, batch.part
    noise, u = noise_and_levels(s, batch, step, micro, kind)
    other = _other_targets(x0, noise, part) if contrast else None
    noise = sent(part.of(noise), x0.device)
    u = shape_timesteps(u, s.timesteps, shift if s.timestep_shift is None else s.timestep_shift)
    timesteps = timesteps_at(schedule, part.of(u))
    more = {"contrast": contrast, "mask": batch.mask, "other": other}
    losses, plain = training_losses(predict, schedule, x0, noise, timesteps, s.snr_gamma, teacher, **more)
    if weights is not None:
        losses = losses * sent(weights.of(batch.ids, part), losses.device)
        weights.seen(batch.ids, plain, u, part)
    return batch.weight * part.mean(losses)


def _other_targets(x0: Tensor, noise: Tensor, part: RowShard) -> Tensor:
    """The flow's target of the image before each in the whole batch, which another process may have, (b, C, h, w)."""
    whole = current().whole(x0.float(), part)
    return part.of((sent(noise, x0.device) - whole).roll(1, 0))


def fixed_samples(dataset: ImageDataset, seed: int, device: torch.device) -> list[tuple[Batch, Tensor, Tensor]]:
    """Held-out batches with noise and levels that are always the same, each several times where they are few."""
    batches = dataset.held_out()
    count = sum(len(batch.latents) for batch in batches)
    rounds = -(-FEWEST // count) if count else 0
    if not count:
        say("no image is held out, so there is no validation loss")
    levels, found = fixed_levels(rounds * count, seed), []
    for number, batch in enumerate(batches * rounds):
        u, levels = levels[: len(batch.latents)], levels[len(batch.latents) :]
        noise = seeded.normal(tuple(batch.latents.shape), seed, "validation", number).to(device)
        found.append((batch, noise, u))
    return found


def grid_captions(dataset: ImageDataset, samples: Sequence[tuple[Batch, Tensor, Tensor]], count: int) -> list[str]:
    """Different captions for the sample grid: those of held-out images first."""
    captions = [caption for batch, _, _ in samples for caption in batch.captions]
    return list(dict.fromkeys(filter(None, [*captions, *dataset.captions(4 * count)])))[:count]


def validation_scores(
    parts: Iterable[tuple[Predict, Tensor, Tensor, Tensor, Tensor | None]],
    schedule: Schedule,
    snr_gamma: float | None,
    levels: int = 0,
) -> dict[str, float]:
    """The loss and the error of x0, over parts of held-out samples.

    A part is (predict, x0, noise, noise levels in (0, 1), mask or None).
    With `levels` also the loss in each of so many equal parts of the noise levels: `loss_0_25` is that of 0 to 25 %.
    """
    found: dict[str, list[Tensor]] = {"validation_loss": [], "x0_error": []}
    for predict, x0, noise, u, mask in parts:
        losses = training_loss(predict, schedule, x0, noise, timesteps_at(schedule, u), snr_gamma, mask=mask)
        found["validation_loss"].append(losses.mean().expand(len(x0)))
        found["x0_error"].append(x0_error(predict, schedule, x0, noise, u.to(x0.device), mask))
        for part in range(levels):
            name = f"loss_{100 * part // levels}_{100 * (part + 1) // levels}"
            found.setdefault(name, []).append(losses.cpu()[(u * levels).long() == part])
    means = {name: torch.cat(values) for name, values in found.items()}
    return {name: values.mean().item() for name, values in means.items() if len(values)}


def decoded(vae: VAE, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) -> images (B, 3, H, W) on the CPU, in the autoencoder's own precision also inside of
    autocast, one by one, and large ones in tiles."""
    tile = TILE if latents[0, 0].numel() > AUTO**2 else None
    with torch.autocast(latents.device.type, enabled=False):
        return torch.cat([vae.decode(one.float(), tile).cpu() for one in latents.split(1)])


def draw_grid(
    denoise: Denoise,
    schedule: Schedule,
    sigmas: Tensor,
    sampler: str,
    shape: tuple[int, ...],  # of one image's latents: (C, h, w)
    rows: Iterable[int],
    seed: int,
    device: torch.device,
    spacing: str | None = None,
) -> Tensor:
    """Latents (B, C, h, w) of the grid's images `rows`, each from noise of its own that is always the same."""

    def noise(*step: int) -> Tensor:
        return sent(torch.stack([seeded.normal(shape, seed, "grid", i, *step) for i in rows]), device)

    return sample(denoise, schedule, sigmas, noise(), sampler, noise=noise, spacing=spacing)
