"""Networks of the usual sizes with random weights, the same on both sides: U-Net steps, VAE decoding, steps of a LoRA.

Shapes:  B rows   C, h, w latent channels, height, width   S tokens   D width of the text
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.bench.timing import COMPILED, OURS, PEER, PEER_FP32, Row, Side, Work
from ldm.device import check_dtype, dtype_name, fast_bf16, keep_memory, missing_compiler, pick_device, pick_dtype
from ldm.diffusion.denoiser import target
from ldm.diffusion.schedule import Schedule
from ldm.nn.batch_invariant import layout
from ldm.nn.lora import attach, new_updates
from ldm.nn.openvino import openvino_code
from ldm.nn.unet import UNet, UNetConfig
from ldm.nn.vae import VAE
from ldm.nn.weights import on_meta
from ldm.training.forecast import TOKENS, Trial, TrialBatch, costs, inputs_of
from ldm.training.loop.step import prepare, take_step
from ldm.training.settings import UNetSettings

SD15 = {"block_out_channels": (320, 640, 1280, 1280), "transformer_layers": (1, 1, 1, 0), "num_heads": (8, 8, 8, 8)}
SD15 |= {"cross_attention_dim": 768, "sample_size": 64}
SD21 = {**SD15, "num_heads": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
SD21 |= {"sample_size": 96}
XL = {"block_out_channels": (320, 640, 1280), "transformer_layers": (0, 2, 10), "num_heads": (5, 10, 20)}
XL |= {"cross_attention_dim": 2048, "sample_size": 128, "use_linear_projection": True}
XL |= {"mid_transformer_layers": 10, "addition_embed_type": "text_time", "addition_time_embed_dim": 256}
XL |= {"projection_class_embeddings_input_dim": 2816}
SIZES = {"sd15": ("SD 1.5", SD15), "sd21": ("SD 2.1", SD21), "xl": ("XL", XL)}
AUTOENCODER = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
AUTOENCODER |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
AUTOENCODER |= {"norm_num_groups": 32, "sample_size": 512, "scaling_factor": 0.18215}
FACTOR = 8  # pixels of a latent
QUICK = 24  # latents a side: 192 pixels
FEW = 2  # layers of a transformer with `quick`, at most
LIMITS = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.02}  # RMS of the difference over that of the answer
RANK = 16
BLOCK = 4_194_301  # random numbers, a prime: no row of weights is another's


def with_compiled(row: Row, side: Side, quick: bool) -> Row:
    """The row with diffusers compiled as another side, or with the reason why it is not there."""
    missing = missing_compiler(torch.device(row.device))
    why = "not with --quick" if quick else missing and f"needs {missing}"
    return replace(row, left_out={COMPILED: why}) if why else replace(row, sides={**row.sides, COMPILED: side})


def resolve_place(device: str, dtype: str) -> tuple[str, str]:
    """The names of the device and the dtype; `auto` is the one that is fastest there. Raises ConfigError."""
    place, dtype = pick_device(device), check_dtype(dtype)
    if dtype == "auto" and place.type == "cpu":
        dtype = "bf16" if fast_bf16(place) else "fp32"
    return str(place), dtype_name(pick_dtype(dtype, place))


def unet_row(size: str, dtype: str = "auto", device: str = "cpu", quick: bool = False) -> Row:
    """A step with guidance, which is a call with two rows, at the model's own size (`quick`: 192x192, few layers)."""
    title, config, sized = _sized(size, quick)
    device, dtype = resolve_place(device, dtype)
    needs = _unet_bytes(config, dtype)
    sides = {OURS: Side(unet_ldm, (config, dtype, device), needs)}
    sides[PEER] = Side(unet_diffusers, (config, dtype, device, False), needs)
    settings = {**sized, "dtype": dtype, "device": device, "threads": torch.get_num_threads()}
    if dtype != "fp32" and not quick:
        sides[PEER_FP32] = Side(unet_diffusers, (config, "fp32", device, False), _unet_bytes(config, "fp32"))
    if device == "cpu" and util.find_spec("openvino") and not quick:  # converting takes a minute and more
        sides["openvino"] = Side(unet_openvino, (config, dtype), 2 * _unet_bytes(config, "fp32"))
    row = Row(f"unet-{size}", f"U-Net of {title}, a step", sides, settings, LIMITS[dtype], True, device=device)
    return with_compiled(row, Side(unet_diffusers, (config, dtype, device, True), needs), quick)


def vae_row(dtype: str = "auto", device: str = "cpu", quick: bool = False) -> Row:
    """Latents of one image to pixels, at 512x512 (`quick`: 192x192), with an autoencoder of SD's size."""
    device, dtype = resolve_place(device, dtype)
    latents = QUICK if quick else AUTOENCODER["sample_size"] // FACTOR
    needs = 0.2e9 + (latents * FACTOR) ** 2 * 128 * 10 * 4.0
    sides = {OURS: Side(vae_ldm, (AUTOENCODER, latents, dtype, device), needs)}
    sides[PEER] = Side(vae_diffusers, (AUTOENCODER, latents, dtype, device, False), needs)
    pixels = latents * FACTOR
    settings = {"size": f"{pixels}x{pixels}", "dtype": dtype, "device": device, "threads": torch.get_num_threads()}
    row = Row("vae", "VAE of SD, decoding", sides, settings, LIMITS[dtype], True, device=device)
    return with_compiled(row, Side(vae_diffusers, (AUTOENCODER, latents, dtype, device, True), needs), quick)


def lora_row(size: str, dtype: str = "auto", device: str = "cpu", quick: bool = False) -> Row:
    """A step of fine-tuning a LoRA of rank 16 on the attention, one image, from latents; the other side uses peft."""
    title, config, sized = _sized(size, quick)
    device, dtype = resolve_place(device, dtype)
    dtype = "bf16" if dtype == "fp16" else dtype
    needs = _unet_bytes(config, dtype) + costs(config, False)[2] * (0.5 if dtype == "bf16" else 1)
    sides = {OURS: Side(lora_ldm, (config, dtype, device), needs)}
    left_out = {}
    if util.find_spec("peft"):
        sides[PEER] = Side(lora_diffusers, (config, dtype, device), needs)
    else:
        left_out[PEER] = "peft is not installed"
    settings = {**sized, "dtype": dtype, "device": device, "threads": torch.get_num_threads()}
    row = Row(f"lora-{size}", f"LoRA of {title}, a step", sides, settings, LIMITS[dtype], True, 1, device)
    return replace(row, left_out=left_out)


def _sized(size: str, quick: bool) -> tuple[str, UNetConfig, dict[str, Any]]:
    """(what the size is called, the config, the settings that tell of it); `quick`: all widths, but few layers."""
    title, shape = SIZES[size]
    config, told = UNetConfig(**shape), {}
    if quick:
        few = tuple(min(layers, FEW) for layers in config.transformer_layers)
        middle = min(config.mid_transformer_layers, FEW)
        config = replace(
            config, sample_size=QUICK, layers_per_block=1, transformer_layers=few, mid_transformer_layers=middle
        )
        told = {"depth": "one block a level"}
    side = (config.sample_size or 0) * FACTOR
    return title, config, {"size": f"{side}x{side}", **told}


def _unet_bytes(config: UNetConfig, dtype: str) -> float:
    """Weights (and in fp32 on CPUs kernels for Winograd), and what a call with two rows holds at once, about."""
    numbers = sum(parameter.numel() for parameter in on_meta(lambda: UNet(config)).parameters())
    pixels, width = (config.sample_size or 0) ** 2, config.block_out_channels[0]
    item = 4 if dtype == "fp32" else 2
    return item * (numbers * (1.5 if item == 4 else 1.1) + 40 * 2 * pixels * width)


def filled(module: nn.Module, dtype: str, device: str) -> nn.Module:
    """A module of the meta device with random weights, which depend on their names and shapes alone."""
    place, kind, state = torch.device(device), pick_dtype(dtype, torch.device(device)), {}
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).to(kind)
    for name, tensor in module.state_dict().items():
        flat = torch.empty(tensor.numel(), dtype=kind)
        first = zlib.crc32(name.encode()) % (BLOCK // 2)
        fan = tensor.numel() // len(tensor) if tensor.ndim > 1 else 2500
        for part in flat.split(BLOCK - first):
            torch.mul(block[first : first + len(part)], 1 / math.sqrt(fan), out=part)
        if tensor.ndim == 1 and name.endswith("weight"):
            flat.add_(1)  # norms: about 1
        state[name] = flat.view(tensor.shape).to(place)
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def _drawn(config: UNetConfig, rows: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Random x (B, C, h, w), timesteps (B,), and the keywords of UNet.forward, `states` (B, S, D) among them."""
    draw, side = torch.Generator().manual_seed(1), config.sample_size or 0

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype)

    x = normal(rows, config.in_channels, side, side)
    return x, torch.full((rows,), 500.0, device=device), inputs_of(config, normal, rows, TOKENS)


def _work(call: Callable[[], Tensor]) -> Work:
    """A call without gradients, whose result is compared."""
    return Work(torch.inference_mode()(call), torch.inference_mode()(lambda: call().float().cpu()))


def unet_ldm(config: UNetConfig, dtype: str, device: str) -> Work:
    unet = filled(on_meta(lambda: UNet(config)), dtype, device)
    kind = next(unet.parameters()).dtype
    unet.to(memory_format=layout(torch.device(device), kind, config))
    x, t, inputs = _drawn(config, 2, kind, device)
    states = inputs.pop("states")
    with torch.no_grad():
        cache = unet.prepare()
    return _work(lambda: unet(x, t, states, cache=cache, **inputs))


def unet_diffusers(config: UNetConfig, dtype: str, device: str, compiled: bool) -> Work:
    unet = filled(_peer(config), dtype, device)
    x, t, inputs = _drawn(config, 2, next(unet.parameters()).dtype, device)
    call = torch.compile(unet) if compiled else unet
    states, added = inputs.pop("states"), _added(inputs)
    return _work(lambda: call(x, t, states, added_cond_kwargs=added, return_dict=False)[0])


def unet_openvino(config: UNetConfig, dtype: str) -> Work:
    """diffusers' U-Net, converted from memory, with fixed shapes."""
    x, t, inputs = _drawn(config, 2, torch.float32, "cpu")
    states, added = inputs.pop("states"), _added(inputs)
    names = tuple(added or ())

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = filled(_peer(config), "fp32", "cpu")

        def forward(self, x: Tensor, t: Tensor, states: Tensor, *rest: Tensor) -> Tensor:
            more = dict(zip(names, rest)) or None
            return self.unet(x, t, states, added_cond_kwargs=more, return_dict=False)[0]

    given = (x, t, states, *(added or {}).values())
    run, arrays = openvino_code(Traced(), given, pick_dtype(dtype, torch.device("cpu"))), [t.numpy() for t in given]
    return Work(lambda: run(arrays), lambda: torch.from_numpy(run(arrays)[0]).float())


def _peer(config: UNetConfig) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return on_meta(lambda: UNet2DConditionModel.from_config(config.to_diffusers()))


def _added(inputs: dict[str, Tensor]) -> dict[str, Tensor] | None:
    return {"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]} if inputs else None


def vae_ldm(config: dict[str, Any], latents: int, dtype: str, device: str) -> Work:
    vae = VAE(filled(on_meta(lambda: VAE.from_config(config).module), dtype, device))
    if device == "cpu":
        vae.to(memory_format=torch.channels_last)  # as a model that is loaded
    z = torch.randn(1, vae.latent_channels, latents, latents, generator=torch.Generator().manual_seed(1)).to(device)
    return _work(lambda: vae.decode(z))


def vae_diffusers(config: dict[str, Any], latents: int, dtype: str, device: str, compiled: bool) -> Work:
    from diffusers import AutoencoderKL

    vae: Any = filled(on_meta(lambda: AutoencoderKL.from_config(config)), dtype, device)
    z = torch.randn(1, config["latent_channels"], latents, latents, generator=torch.Generator().manual_seed(1))
    z = (z / config["scaling_factor"]).to(device, vae.dtype)
    decode = torch.compile(vae.decode) if compiled else vae.decode
    return _work(lambda: decode(z, return_dict=False)[0].float().clamp(-1, 1))


class _Lora(Trial):
    """A step on random rows, of updates of the attention."""

    def __init__(self, settings: UNetSettings, module: UNet, device: str):
        self.schedule, self.config, self.count = Schedule(), module.config, 1
        self.module, self.device, self.tokens = module, torch.device(device), TOKENS

    def batches(self, first_step: int) -> Iterator[TrialBatch]:
        return itertools.repeat(next(super().batches(first_step)))


def lora_ldm(config: UNetConfig, dtype: str, device: str) -> Work:
    keep_memory()  # as a run does
    unet = filled(on_meta(lambda: UNet(config)), dtype, device)
    x, t, inputs = _drawn(config, 1, next(unet.parameters()).dtype, device)
    states = inputs.pop("states")
    with torch.no_grad():
        answer = unet(x, t, states, **inputs).float().cpu()
    attach(unet, new_updates(unet, ("attention",), RANK, RANK))
    settings = UNetSettings("unet", 100, 1, 1e-4, vae="-", text="-", precision=dtype, device=device, ema=0.0)
    stage = _Lora(settings, unet, device)
    state, batches = prepare(stage, settings, torch.device(device)), stage.batches(0)
    return Work(lambda: take_step(stage, state, settings, batches), lambda: answer)


def lora_diffusers(config: UNetConfig, dtype: str, device: str) -> Work:
    """As in diffusers' train_text_to_image_lora.py, from latents and embeddings in memory."""
    from peft import LoraConfig

    unet: Any = filled(_peer(config), dtype, device)
    x, t, inputs = _drawn(config, 1, unet.dtype, device)
    states, added = inputs.pop("states"), _added(inputs)
    with torch.no_grad():
        answer = unet(x, t, states, added_cond_kwargs=added, return_dict=False)[0].float().cpu()
    names = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=names))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer, schedule = torch.optim.AdamW(trained, lr=1e-4), Schedule()
    alpha, sigma = (value.to(device).view(-1, 1, 1, 1) for value in schedule.alpha_sigma(t.long().cpu()))

    def step() -> None:
        noise = torch.randn_like(x)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bf16"):
            answer = unet(alpha * x + sigma * noise, t, states, added_cond_kwargs=added, return_dict=False)[0]
        F.mse_loss(answer.float(), target(schedule, x, noise, alpha, sigma).float()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Work(step, lambda: answer)
