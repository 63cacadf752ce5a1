"""Stage 1, the autoencoder: images to latents of unit variance and back (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ldm import images
from ldm.data.transforms import to_float
from ldm.device import pick_device, sent
from ldm.training.checks import check_same
from ldm.training.data import ImageSet, PixelDataset, PreparedSet, SceneSet
from ldm.training.distributed import RowShard, by_itself
from ldm.training.loop import seeded
from ldm.training.settings import AutoencoderSettings
from ldm.training.stages.start import start_from

GRID = 8  # held-out images in the sample grid
STANDARD = 256  # images that the latents are given unit variance over


class Crops(NamedTuple):
    """Rows of a batch."""

    pixels: Tensor  # (B, 3, H, W) in [-1, 1]
    part: RowShard
    weight: float = 1.0  # of their mean loss in that of the step's batches, where these differ in size


def open_stage(settings: AutoencoderSettings, out: Path, images: ImageSet | PreparedSet | SceneSet) -> Autoencoder:
    return Autoencoder(settings, out, images)


class Autoencoder:
    """diffusers' AutoencoderKL on crops of the images: L1 + MSE + gradient difference + small KL."""

    def __init__(self, settings: AutoencoderSettings, out: Path, images: ImageSet | PreparedSet | SceneSet):
        self.settings = settings
        self.data = PixelDataset(images, None, settings.seed, settings.batch_size // settings.crops, out)
        self.lines, self.inputs = self.data.lines, self.data.inputs
        self.held_out = self.data.held_out_pixels(max(settings.validation, GRID))
        torch.manual_seed(seeded.key(settings.seed, "autoencoder"))
        size = {"sample_size": settings.data.resolution}
        self.module = start_from(settings.init, "vae") or AutoencoderKL.from_config({**size, **settings.model})
        if settings.init:
            check_same(settings.model, self.module.config, settings.init)
        if settings.freeze_encoder:
            for part in filter(None, (self.module.encoder, self.module.quant_conv)):
                part.requires_grad_(False)
        self.module.to(memory_format=torch.channels_last)
        _norm_in_nchw(self.module)
        self.device = pick_device(settings.device)

    def batches(self, first_step: int) -> Iterator[Crops]:
        s = self.settings
        with closing(self.data.pixel_batches(first_step, s.steps, s.accumulation)) as batches:
            for number, batch in enumerate(batches, first_step * s.accumulation):
                step, micro = divmod(number, s.accumulation)
                pixels, part = batch.pixels, batch.part
                if s.crop and step < s.crop_until * s.steps:
                    pixels, part = random_crops(pixels, part, s.crop, s.crops, s.seed, step, micro)
                yield Crops(to_float(sent(pixels, self.device)), part, batch.weight)

    def loss(self, batch: Crops, step: int, micro: int) -> Tensor:
        s, (x, part, weight) = self.settings, batch
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = self.module.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = part.of(seeded.normal((part.size, *mean.shape[1:]), s.seed, "posterior", step, micro))
        noise = sent(noise, mean.device)
        y = self.module.decode(mean + noise * (0.5 * logvar).exp()).sample.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        loss = s.l1 * (y - x).abs().mean() + s.mse * F.mse_loss(y, x) + s.gradient * gradient_loss(y, x) + s.kl * kl
        return weight * part.mean(loss)

    @torch.no_grad()
    def validate(self, ema: nn.Module, step: int) -> dict[str, float]:
        """PSNR in dB on held-out images, the mean of the values of single images."""
        values, count = [], min(len(self.held_out), self.settings.validation)
        for start in range(0, count, 10):
            x = self._images(range(start, min(start + 10, count)))
            mse = ((_reconstruct(ema, x) - x) / 2).square().mean((1, 2, 3))  # of values in [0, 1]
            values += (-10 * mse.clamp_min(1e-10).log10()).tolist()
        return {"psnr": sum(values) / len(values)} if values else {}

    @torch.no_grad()
    def sample_grid(self, ema: nn.Module):
        """Eight held-out images above their reconstructions; None where no image is held out."""
        if not self.held_out:
            return None
        x = self._images(range(min(GRID, len(self.held_out))))
        return images.grid(images.to_pil(torch.cat([x, _reconstruct(ema, x)]).cpu()), columns=len(x))

    def _images(self, indices: range) -> Tensor:
        batch = torch.stack([self.held_out[i] for i in indices])
        return to_float(batch.to(self.device)).contiguous(memory_format=torch.channels_last)

    def export(self, ema: nn.Module, folder: Path, scores: dict[str, float]) -> Path:
        from ldm.checkpoint.parts import save_parts
        from ldm.nn.vae import VAE

        module = AutoencoderKL.from_config(dict(ema.config))
        module.load_state_dict(ema.state_dict())
        if not self.settings.freeze_encoder:  # else the latents stay what they were
            with by_itself(), closing(self.data):  # this process alone exports
                standardize(module, torch.cat([to_float(pixels) for pixels in self._train_images(STANDARD)]))
        return save_parts(folder, torch.bfloat16, vae=VAE(module))

    def _train_images(self, count: int) -> Iterator[Tensor]:
        """uint8 (B, 3, H, W), at least `count` images together."""
        each = self.settings.batch_size // self.settings.crops
        return (self.data.pixels(number).pixels for number in range(-(-count // each)))


def _reconstruct(module: nn.Module, x: Tensor) -> Tensor:
    return module.decode(module.encode(x).latent_dist.mean).sample.clamp(-1, 1)


@torch.no_grad()
def standardize(module: nn.Module, x: Tensor) -> None:
    """Give the latents of the images `x` mean 0 and variance 1, without changing a reconstruction.

    Each channel's affine map goes into the 1×1 convolutions on both sides of the latents, so scaling_factor is 1 and
    every reader of the format gets it right. Without these convolutions, as in SD3 and FLUX, all channels together get
    scaling_factor and shift_factor.
    """
    z = torch.cat([module.encode(part).latent_dist.mean for part in x.split(32)])
    module.register_to_config(latents_mean=None, latents_std=None)  # of the autoencoder that was begun with
    quant, post = module.quant_conv, module.post_quant_conv
    if quant is None or post is None:
        module.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
        return
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    channels = len(mean)
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]
    quant.bias[:channels] -= mean
    quant.bias[:channels] /= std
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[channels:] -= 2 * std.log()  # log of the variance
    module.register_to_config(scaling_factor=1.0, shift_factor=None)


def gradient_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 distance of the differences between neighbouring pixels, in both directions: sharp edges."""
    d = y - x
    return d.diff(dim=2).abs().mean() + d.diff(dim=3).abs().mean()


def random_crops(
    batch: Tensor, part: RowShard, size: int, count: int, seed: int, step: int, micro: int
) -> tuple[Tensor, RowShard]:
    """`count` crops (B·count, 3, size, size) of each of these rows (B, 3, H, W) of a batch, and which rows they are.

    Their places are keyed by (seed, step, micro) and the row.
    """
    height, width = batch.shape[2:]
    crops = part.repeated(count)
    u = crops.of(seeded.uniform((crops.size, 2), seed, "crop", step, micro))
    tops, lefts = ((u[:, i] * (side - size + 1)).long().tolist() for i, side in enumerate((height, width)))
    found = [batch[i // count, :, t : t + size, l : l + size] for i, (t, l) in enumerate(zip(tops, lefts))]
    return torch.stack(found), crops


class _NormInNCHW(nn.GroupNorm):
    """GroupNorm's backward pass on a CPU takes ten times as long in channels-last as in NCHW."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.group_norm(x.contiguous(), self.num_groups, self.weight, self.bias, self.eps)
        return y.contiguous(memory_format=torch.channels_last) if y.ndim == 4 else y  # of attention: (B, C, H * W)


def _norm_in_nchw(module: nn.Module) -> None:
    for part in module.modules():
        if type(part) is nn.GroupNorm:
            part.__class__ = _NormInNCHW
