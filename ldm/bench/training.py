"""Steps of training a U-Net from nothing: `ldm train` against a plain loop over diffusers' U-Net, both from a cache.

Shapes:  B images of a step   C, h, w latent channels, height, width   S tokens   D width of the text
"""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ldm.bench.timing import Timing, alternate, own_process
from ldm.config import build, require
from ldm.console import hushed
from ldm.data.cache.prepared import FORMAT, TEXT, PartWriter, Row, list_shards, read_shard
from ldm.data.sources.walk import PREPARED
from ldm.device import check_dtype, fast_bf16, keep_memory, pick_device
from ldm.diffusion.denoiser import target
from ldm.diffusion.schedule import Schedule
from ldm.errors import NumericsError
from ldm.nn.unet import UNet
from ldm.training.checkpoints.state import TrainState
from ldm.training.data import Batch, PreparedSet
from ldm.training.loop import seeded
from ldm.training.loop.step import prepare, take_step
from ldm.training.parts import text_parts, unet_config, vae_part
from ldm.training.settings import UNetSettings, read_settings
from ldm.training.stages.common import timesteps_at
from ldm.training.stages.unet import UNetStage

MAX_DIFFERENCE = 1e-3  # of the two networks' answers, in parts of the largest number
SHARED = 64  # cached images


class Case(NamedTuple):
    """What both sides train."""

    config: str
    words: tuple[str, ...]  # KEY=VALUE
    batch_size: int
    dtype: str
    folder: str  # of the cache

    @property
    def settings(self) -> UNetSettings:
        given = (*self.words, f"data={self.folder}", f"batch_size={self.batch_size}", "accumulation=1")
        found = read_settings(self.config, [*given, f"precision={self.dtype}", "workers=0"])
        assert isinstance(found, UNetSettings)  # other stages have no `text`
        return found

    @property
    def unet(self) -> UNet:
        """With its first weights, the same for every caller."""
        s = self.settings
        torch.manual_seed(seeded.key(s.seed, "unet"))
        return UNet(unet_config(s, vae_part(s), text_parts(s)))


def training(
    repeats: int = 5,
    config: str = "small/256",
    vae: str = "default",
    text: str = "default",
    batch_size: int = 8,
    dtype: str = "auto",
    compile: bool = False,
    profile: bool = False,
) -> Timing:
    """Time one step each in alternation: U-Net, weights, batch, dtype, AdamW, clipping and average are equal.

    The step is one of `batch_size` images whose latents and embeddings are random numbers in a cache of `ldm data
    cache`; ours reads its shards, the other side has all in memory. The U-Net is that of `config` with the channels and
    the text's width of `vae` and `text`. `dtype` is that of autocast on both sides (auto: bf16 where it is faster).
    Each side has a process of its own. Raises ConfigError, ModelError, and NumericsError where the networks differ.
    """
    dtype = check_dtype(dtype)
    if dtype == "auto":
        dtype = "bf16" if fast_bf16(pick_device("cpu")) else "fp32"
    require(dtype != "fp16", "fp16 is not supported on a CPU: use bf16 or fp32", "dtype")
    words = (f"vae={vae}", f"text={text}", "optimizer=adamw", "device=cpu", f"compile={str(compile).lower()}")
    with tempfile.TemporaryDirectory() as root, hushed():
        case = Case(config, words, batch_size, dtype, f"{root}/cache")
        numbers = write_cache(case, SHARED)
        with own_process() as ours, own_process() as theirs:
            answers = [ours(_answer_ldm, case), theirs(_answer_plain, case)]
            difference = float((answers[0] - answers[1]).abs().max() / answers[1].abs().max())
            if difference > MAX_DIFFERENCE:
                raise NumericsError(f"the networks differ by {difference:.2g}", where="bench training")
            sides = {
                "ldm train": lambda: ours(_step_ldm, case),
                "a plain loop": lambda: theirs(_step_plain, case),
            }
            seconds = alternate(sides, repeats, warmup=2)
            if profile:
                for call, function in ((ours, _step_ldm), (theirs, _step_plain)):
                    print(call(_profiled, function, case))
    told = {"config": config, "parameters": numbers, "batch_size": batch_size, "dtype": dtype, "compile": compile}
    told["threads"] = torch.get_num_threads()
    timing = Timing("training", seconds, told, {"largest relative difference of the networks": difference})
    mine, other = timing.medians.values()
    rates = {"images/s": batch_size / mine, "images/s of the other": batch_size / other, "times as fast": other / mine}
    return Timing("training", seconds, told, {**timing.agreement, **rates})


def write_cache(case: Case, count: int) -> int:
    """A prepared dataset of so many random images in the case's folder; returns the parameters of the U-Net."""
    root = Path(case.folder)
    root.mkdir()
    (root / PREPARED).write_text("{}")
    s = case.settings
    vae, text = vae_part(s), text_parts(s)
    unet, side = unet_config(s, vae, text), s.data.resolution // vae.factor
    require(unet.addition_embed_type is None, "of XL is not measured: choose one with one text encoder", "config")
    info = {"format": FORMAT, "source": "random numbers", "images": count, "resolution": s.data.resolution}
    info |= {"vae": s.vae, "vae_hash": vae.fingerprint, "embeddings": True, "text_hash": text.fingerprints}
    (root / PREPARED).write_text(json.dumps(info))
    draw, real = torch.Generator().manual_seed(0), text.load().encode(["a cat"])
    kind, sizes = torch.bfloat16, (s.data.resolution,) * 2
    with PartWriter(root / "part-1-of-1") as writer:
        for i in range(count):
            mean = torch.randn(unet.in_channels, side, side, generator=draw).to(kind)
            texts = {"states": torch.randn(real.states.shape, generator=draw).to(kind)}
            if real.pooled is not None:  # as of a real caption: a dropped one has them too
                texts["pooled"] = torch.randn(real.pooled.shape, generator=draw).to(kind)
            if real.mask is not None:
                texts["mask"] = torch.ones_like(real.mask)
            writer.put(Row(i, str(i), (f"image {i}",), (*sizes, 0, 0, *sizes), mean, mean.abs() / 10, texts))
        writer.flush()
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(unet).parameters())


@functools.cache
def _ldm(case: Case) -> tuple[UNetStage, TrainState, UNetSettings, Iterator[Batch]]:
    """The stage of `ldm train`, its state, its settings and its batches."""
    settings = case.settings
    keep_memory()  # as a run does
    with hushed():
        stage = UNetStage(settings, Path(case.folder).parent / "run", PreparedSet(settings.data))
    return stage, prepare(stage, settings, torch.device("cpu")), settings, stage.batches(0)


def _step_ldm(case: Case) -> float:
    stage, state, settings, batches = _ldm(case)
    return take_step(stage, state, settings, batches).loss


class Plain(NamedTuple):
    """What a plain loop has."""

    unet: Any  # diffusers.UNet2DConditionModel
    average: Any  # diffusers.training_utils.EMAModel
    optimizer: torch.optim.Optimizer
    batches: Iterator[list[Tensor]]  # mean, std (B, C, h, w), states (B, S, D)


@functools.cache
def _plain(case: Case) -> Plain:
    """As in diffusers' train_text_to_image.py, with latents and embeddings in memory."""
    from diffusers import UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    s, ours = case.settings, case.unet
    unet = UNet2DConditionModel.from_config(ours.config.to_diffusers())
    unet.load_state_dict(ours.state_dict())
    average = EMAModel(unet.parameters(), decay=s.ema, model_cls=UNet2DConditionModel, model_config=unet.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=s.learning_rate, betas=s.betas, weight_decay=s.weight_decay)
    shards = [read_shard(shard.path) for shard in list_shards(case.folder)]
    columns = [torch.cat([shard[name] for shard in shards]).float() for name in ("mean", "std", f"{TEXT}states")]
    loader = DataLoader(TensorDataset(*columns), case.batch_size, shuffle=True, drop_last=True)
    return Plain(unet.train(), average, optimizer, (batch for _ in itertools.count() for batch in loader))


def _step_plain(case: Case) -> float:
    """Flow or noise is learned, at uniform noise levels; the settings' other aids are left out."""
    s, (unet, average, optimizer, batches) = case.settings, _plain(case)
    mean, std, states = next(batches)
    schedule = build(Schedule, s.schedule, "schedule")
    x0 = mean + std * torch.randn_like(mean)
    noise, times = torch.randn_like(x0), timesteps_at(schedule, torch.rand(len(x0)))
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in schedule.alpha_sigma(times))
    x, told = alpha * x0 + sigma * noise, schedule.network_timesteps(times)
    with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bf16"):
        answer = unet(x, told, states, return_dict=False)[0]
    loss = F.mse_loss(answer.float(), target(schedule, x0, noise, alpha, sigma), reduction="mean")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), s.clip)
    optimizer.step()
    optimizer.zero_grad()
    average.step(unet.parameters())
    return loss.item()


@torch.no_grad()
def _answer_ldm(case: Case) -> Tensor:
    x, states = _inputs(case)
    return case.unet.eval()(x, torch.tensor([500.0]), states)


@torch.no_grad()
def _answer_plain(case: Case) -> Tensor:
    x, states = _inputs(case)
    return _plain(case).unet(x, torch.tensor([500.0]), states, return_dict=False)[0]


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    """The latents (1, C, h, w) and the text (1, S, D) of the first cached image."""
    shard = read_shard(list_shards(case.folder)[0].path)
    return shard["mean"][:1].float(), shard[f"{TEXT}states"][:1].float()


def _profiled(step: Callable[[Case], float], case: Case) -> str:
    """The operators that take longest in a step, as a table of torch's profiler."""
    with torch.profiler.profile() as profile:
        step(case)
    return profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40)
