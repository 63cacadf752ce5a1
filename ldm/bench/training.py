"""Steps of training a U-Net from nothing: `ldm train` against a plain loop over diffusers' U-Net, both from a cache.

Shapes:  B images of a step   C, h, w latent channels, height, width   S tokens   D width of the text
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ldm.bench.networks import with_compiled
from ldm.bench.timing import OURS, PEER, Row, Side, Work, new_folder
from ldm.config import build, require
from ldm.data.cache.prepared import FORMAT, TEXT, PartWriter, list_shards, read_shard
from ldm.data.cache.prepared import Row as CacheRow
from ldm.data.sources.walk import PREPARED
from ldm.device import check_dtype, fast_bf16, keep_memory, pick_device
from ldm.diffusion.denoiser import target
from ldm.diffusion.schedule import Schedule
from ldm.nn.unet import UNet
from ldm.nn.weights import on_meta
from ldm.training.data import PreparedSet
from ldm.training.loop import seeded
from ldm.training.loop.step import prepare, take_step
from ldm.training.parts import text_parts, unet_config, vae_part
from ldm.training.settings import UNetSettings, read_settings
from ldm.training.stages.common import timesteps_at
from ldm.training.stages.unet import UNetStage

MAX_DIFFERENCE = 1e-3  # RMS of the difference of the two networks' answers, over that of an answer
SHARED = 64  # cached images


class Case(NamedTuple):
    """What both sides train."""

    config: str
    words: tuple[str, ...]  # KEY=VALUE
    batch_size: int
    dtype: str

    def settings(self, folder: Path | str = "") -> UNetSettings:
        given = (*self.words, f"data={folder}", f"batch_size={self.batch_size}", "accumulation=1")
        found = read_settings(self.config, [*given, f"precision={self.dtype}", "workers=0"])
        assert isinstance(found, UNetSettings)  # other stages have no `text`
        return found

    def unet(self) -> UNet:
        """With its first weights, the same for every caller."""
        s = self.settings()
        torch.manual_seed(seeded.key(s.seed, "unet"))
        return UNet(unet_config(s, vae_part(s), text_parts(s)))


def training_row(
    config: str = "small/256",
    vae: str = "default",
    text: str = "default",
    batch_size: int = 8,
    dtype: str = "auto",
    compile: bool = False,
    quick: bool = False,
) -> Row:
    """One step: U-Net, weights, batch, dtype, AdamW, clipping and average are equal.

    The step is one of `batch_size` images (`quick`: 2 at most) whose latents and embeddings are random numbers in a
    cache of `ldm data cache`; ours reads its shards, the other side has all in memory. The U-Net is that of `config`
    with the channels and the text's width of `vae` and `text`. `dtype` is that of autocast on both sides (auto: bf16
    where it is faster). Raises ConfigError, ModelError.
    """
    dtype = check_dtype(dtype)
    if dtype == "auto":
        dtype = "bf16" if fast_bf16(pick_device("cpu")) else "fp32"
    require(dtype != "fp16", "fp16 is not supported on a CPU: use bf16 or fp32", "dtype")
    words = (f"vae={vae}", f"text={text}", "optimizer=adamw", "device=cpu", f"compile={str(compile).lower()}")
    case = Case(config, words, min(batch_size, 2) if quick else batch_size, dtype)
    s = case.settings()
    unet = unet_config(s, vae_part(s), text_parts(s))
    require(unet.addition_embed_type is None, "of XL is not measured: choose one with one text encoder", "config")
    numbers = sum(parameter.numel() for parameter in on_meta(lambda: UNet(unet)).parameters())
    needs = 20.0 * numbers + 1e8 * case.batch_size
    sides = {OURS: Side(train_ldm, (case,), needs), PEER: Side(train_plain, (case, False), needs)}
    told = {"config": config, "parameters": numbers, "batch_size": case.batch_size, "dtype": dtype, "compile": compile}
    told["threads"] = torch.get_num_threads()
    row = Row("training", "a step from nothing", sides, told, MAX_DIFFERENCE, True, warmup=0 if quick else 1)
    return with_compiled(row, Side(train_plain, (case, True), needs), quick)


def write_cache(case: Case) -> Path:
    """A prepared dataset of random images; returns its folder."""
    root = new_folder()
    (root / PREPARED).write_text("{}")
    s = case.settings(root)
    vae, text = vae_part(s), text_parts(s)
    unet, side = unet_config(s, vae, text), s.data.resolution // vae.factor
    info = {"format": FORMAT, "source": "random numbers", "images": SHARED, "resolution": s.data.resolution}
    info |= {"vae": s.vae, "vae_hash": vae.fingerprint, "embeddings": True, "text_hash": text.fingerprints}
    (root / PREPARED).write_text(json.dumps(info))
    draw, real = torch.Generator().manual_seed(0), text.load().encode(["a cat"])
    kind, sizes = torch.bfloat16, (s.data.resolution,) * 2
    with PartWriter(root / "part-1-of-1") as writer:
        for i in range(SHARED):
            mean = torch.randn(unet.in_channels, side, side, generator=draw).to(kind)
            texts = {"states": torch.randn(real.states.shape, generator=draw).to(kind)}
            if real.pooled is not None:  # as of a real caption: a dropped one has them too
                texts["pooled"] = torch.randn(real.pooled.shape, generator=draw).to(kind)
            if real.mask is not None:
                texts["mask"] = torch.ones_like(real.mask)
            writer.put(CacheRow(i, str(i), (f"image {i}",), (*sizes, 0, 0, *sizes), mean, mean.abs() / 10, texts))
        writer.flush()
    return root


def train_ldm(case: Case) -> Work:
    """The stage of `ldm train`, its state and its batches."""
    keep_memory()  # as a run does
    root = write_cache(case)
    settings = case.settings(root)
    stage = UNetStage(settings, new_folder() / "run", PreparedSet(settings.data))
    state, batches = prepare(stage, settings, torch.device("cpu")), stage.batches(0)

    @torch.no_grad()
    def answer() -> Tensor:
        x, states = _inputs(root)
        found = stage.module.eval()(x, torch.tensor([500.0]), states)
        stage.module.train()
        return found

    return Work(lambda: take_step(stage, state, settings, batches), answer)


def train_plain(case: Case, compiled: bool) -> Work:
    """As diffusers' train_text_to_image.py, with latents and embeddings in memory.

    Flow or noise is learned, at uniform noise levels; the settings' other aids are left out.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    root, s, ours = write_cache(case), case.settings(), case.unet()
    unet = UNet2DConditionModel.from_config(ours.config.to_diffusers())
    unet.load_state_dict(ours.state_dict())
    del ours
    average = EMAModel(unet.parameters(), decay=s.ema, model_cls=UNet2DConditionModel, model_config=unet.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=s.learning_rate, betas=s.betas, weight_decay=s.weight_decay)
    shards = [read_shard(shard.path) for shard in list_shards(root)]
    columns = [torch.cat([shard[name] for shard in shards]).float() for name in ("mean", "std", f"{TEXT}states")]
    loader = DataLoader(TensorDataset(*columns), case.batch_size, shuffle=True, drop_last=True)
    batches = (batch for _ in itertools.count() for batch in loader)
    schedule, network = build(Schedule, s.schedule, "schedule"), torch.compile(unet) if compiled else unet

    def step() -> None:
        mean, std, states = next(batches)
        x0 = mean + std * torch.randn_like(mean)
        noise, times = torch.randn_like(x0), timesteps_at(schedule, torch.rand(len(x0)))
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in schedule.alpha_sigma(times))
        x, told = alpha * x0 + sigma * noise, schedule.network_timesteps(times)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bf16"):
            answer = network(x, told, states, return_dict=False)[0]
        loss = F.mse_loss(answer.float(), target(schedule, x0, noise, alpha, sigma), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), s.clip)
        optimizer.step()
        optimizer.zero_grad()
        average.step(unet.parameters())

    @torch.no_grad()
    def answer() -> Tensor:
        x, states = _inputs(root)
        return unet.train()(x, torch.tensor([500.0]), states, return_dict=False)[0]

    return Work(step, answer)


def _inputs(root: Path) -> tuple[Tensor, Tensor]:
    """The latents (1, C, h, w) and the text (1, S, D) of the first cached image."""
    shard = read_shard(list_shards(root)[0].path)
    return shard["mean"][:1].float(), shard[f"{TEXT}states"][:1].float()
