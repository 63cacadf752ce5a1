"""What the stages share: weights to start from, held-out samples, timesteps, validation and sample grids."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoint.parts import load_unet_from, load_vae_from
from ldm.diffusion.denoiser import Denoise, Predict, training_loss, x0_error
from ldm.diffusion.sampling import sample
from ldm.diffusion.schedule import Schedule
from ldm.nn.text import Conditioning
from ldm.training.checkpoints import state
from ldm.training.checks import model_folder
from ldm.training.data.samples import Samples
from ldm.training.loop import seeded

SEED_OFFSET = 1_000_003  # from the seed of training samples to that of held-out ones
Network = Callable[[Tensor, Tensor, Conditioning], Tensor]  # (x (B, C, h, w), timesteps (B,), texts) -> raw


def start_from(init: str | None, part: str) -> nn.Module | None:
    """The network `part` ("vae", "unet") of another run or of a model folder; None without init.

    A run's U-Net has its fp32 EMA weights; its autoencoder is the exported one, whose latents have unit variance.
    Raises ModelError where `init` is neither a run nor a model folder.
    """
    if init is None:
        return None
    module = load_vae_from(model_folder(init)).module if part == "vae" else load_unet_from(model_folder(init))
    newest = state.checkpoints(Path(init))[-1:]
    if newest and part == "unet":
        tensors = state.read_tensors(newest[0])
        average = {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}
        average = {k.removeprefix("unet."): v for k, v in average.items() if not k.startswith("text.")}
        module.load_state_dict(average)
    return module.float().requires_grad_(True)


def networks_of(module: nn.Module) -> dict[str, nn.Module]:
    """The networks that are trained, by name: the U-Net alone, or a ModuleDict with its text encoders."""
    return dict(module.items()) if isinstance(module, nn.ModuleDict) else {"unet": module}


def distinct(samples: Samples, count: int) -> dict[str, int]:
    """caption → index of the first `count` samples whose captions differ (fewer where 50 × count hold no more)."""
    found: dict[str, int] = {}
    for index in range(50 * count):
        found.setdefault(samples.captions(index, 1)[0], index)
        if len(found) == count:
            break
    return found


def conditioned(unet: Callable[..., Tensor], time_ids: tuple[float, ...] | Tensor | None = None) -> Network:
    """The U-Net as network(x, timesteps, cond); XL's is told `time_ids`, (B, 6) or the same six for every image."""

    def network(x: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        ids = x.new_tensor([time_ids] * len(x)) if isinstance(time_ids, tuple) else time_ids
        return unet(x, timesteps, cond.states, mask=cond.mask, pooled=cond.pooled, time_ids=ids)

    return network


def shape_timesteps(u: Tensor, timesteps: str, shift: float) -> Tensor:
    """Uniform (B,) in [0, 1) → [0, 1), as often at low and at high noise as the settings say."""
    if timesteps == "logit_normal":
        u = torch.sigmoid(torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6))).float()
    return shift * u / (1 + (shift - 1) * u)  # Esser et al. 2024, eq. 23


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


def validation_scores(
    parts: Iterable[tuple[Predict, Tensor, Tensor, Tensor]], schedule: Schedule, snr_gamma: float | None
) -> dict[str, float]:
    """The loss and the error of x0, over parts of held-out samples: (predict, x0, noise, noise levels in (0, 1))."""
    found: dict[str, list[Tensor]] = {"validation_loss": [], "x0_error": []}
    for predict, x0, noise, u in parts:
        timesteps = timesteps_at(schedule, u).to(x0.device)
        loss = training_loss(predict, schedule, x0, noise, timesteps, snr_gamma).mean()
        found["validation_loss"].append(loss.expand(len(x0)))
        found["x0_error"].append(x0_error(predict, schedule, x0, noise, u.to(x0.device)))
    return {name: torch.cat(values).mean().item() for name, values in found.items()}


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
        return torch.stack([seeded.normal(shape, seed, "grid", i, *step) for i in rows]).to(device)

    return sample(denoise, schedule, sigmas, noise(), sampler, noise=noise, spacing=spacing)
