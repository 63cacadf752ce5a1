"""A model at work: which it is, where its parts are, with which LoRAs. Pipeline and ldm.render draw with it."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm import console
from ldm.checkpoint import Model, load_model
from ldm.checkpoint.describe import ModelInfo, describe
from ldm.checkpoint.memory import memory_of, offload_line, weight_shapes
from ldm.checkpoint.single import listed_texts
from ldm.checkpoint.types import check_prediction_type
from ldm.config import require
from ldm.device import check_quantization, dtype_name, is_out_of_memory, let_go, pick_device, pick_dtype, without_tf32
from ldm.diffusion.denoiser import sample
from ldm.diffusion.guidance.guided import guided_denoiser
from ldm.errors import ConfigError, ModelError, NumericsError, ResourceError
from ldm.images import to_pil
from ldm.nn.compiled import CompiledUNet
from ldm.nn.ip_adapter import ImageAttention
from ldm.nn.mmdit import MMDiT
from ldm.nn.step_cache import StepCache
from ldm.nn.tiling import TILE
from ldm.nn.unet import Encoder as UNetEncoder
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE
from ldm.pipeline.adapters import DORA_SCALINGS, Adapter, Adapters
from ldm.pipeline.checks import check_bool
from ldm.pipeline.control import ControlNets, listed
from ldm.pipeline.edit import Start, composite, encode_init_images, enlarge
from ldm.pipeline.encode import Encoder, PromptTokens, draw_noise
from ldm.pipeline.ip_adapter import IPAdapters
from ldm.pipeline.keywords import MAX_IMAGES
from ldm.pipeline.placement import Placement
from ldm.pipeline.request import ImageRequest, Run, Settings
from ldm.pipeline.steering import Steering

EITHER = "leave one of them out"
DECODED_AT_ONCE = 4 * 64 * 64  # latents (h * w, of all images) that a GPU decodes in one call: four images of 512x512

# called as (i, x, x0) after step i of a batch, x and x0 (B, C, h, w)
Watch = Callable[[int, torch.Tensor, torch.Tensor], Any]


class Engine:
    """Draws images with one model. Its arguments are Pipeline's; it raises as Pipeline does and reads no weight."""

    def __init__(
        self,
        model: str | os.PathLike | Model,
        *,
        vae: str | os.PathLike | None = None,
        prediction_type: str | None = None,
        device: Any = "auto",
        dtype: Any = "auto",
        offload: bool | str = False,
        attention: str = "auto",
        compile: bool = False,
        backend: str = "torch",
        allow_unapplied: bool = False,
        dora_scaling: str = "linear",
        controlnet: Any = None,
        ip_adapter: Any = None,
        image_encoder: Any = None,
        text_encoders: Any = None,
        quantization: str | None = None,
    ):
        self.model, self.vae, self.prediction_type = model, vae, prediction_type
        self.text_encoders, self.quantization = text_encoders, check_quantization(quantization, installed=False)
        self.device, self.dtype = _place(model, device, dtype, offload)
        self.placement = Placement(self.device, offload, attention, compile, backend)
        if vae is not None or prediction_type is not None:
            _check_replaced(model, vae)
            self.prediction_type = check_prediction_type(prediction_type)
        self.info = describe(model, vae, prediction_type, text_encoders=text_encoders)
        if offload == "blocks" and self.info.transformer is None:
            what = "blocks of a U-Net cannot be lent one at a time"
            raise ConfigError(what, where="offload", hint="use offload without blocks")
        if self.quantization:
            _check_quantized(self.quantization, model, self.info)
        for line in self.info.notes:
            console.say(line)
        for line in self.info.doubts:
            console.warn(line)
        if dora_scaling not in DORA_SCALINGS:
            raise ConfigError(f"expected linear or peft, got {dora_scaling!r:.80}", where="dora_scaling")
        self.controlnets: ControlNets | None = None
        self.ip_adapters: IPAdapters | None = None
        if controlnet is not None or ip_adapter is not None or image_encoder is not None:
            self._attach(controlnet, ip_adapter, image_encoder)
        if word := self.placement.makes_code:
            beside = self.info.transformer or self.controlnets or self.ip_adapters
            what = "is for a U-Net alone: not for flow transformers, nor with a controlnet or an ip_adapter"
            require(beside is None, what, word)
        self.allow_unapplied = check_bool(allow_unapplied, "allow_unapplied")
        self._adapters = Adapters(self.allow_unapplied, dora_scaling)
        self._tokens = PromptTokens()
        self._told_memory = False
        self._room: dict[int, int] = {}  # pixels of an image -> images of a batch that memory had room for
        self._encoder: Encoder | None = None  # the one used last

    def _attach(self, controlnet: Any, ip_adapter: Any, image_encoder: Any) -> None:
        if controlnet is not None:
            self.controlnets = ControlNets(listed(controlnet), self.info)
            self.info = self.controlnets.fitted(self.info)
        if ip_adapter is None and image_encoder is not None:
            raise ConfigError("needs an ip_adapter", where="image_encoder")
        if ip_adapter not in (None, (), []):
            self.ip_adapters = IPAdapters(listed(ip_adapter), image_encoder, self.info)

    @property
    def attached(self) -> dict[str, Any]:
        """What works beside the model, as generate's settings are checked with it: keyword -> what was given."""
        found = {"controlnet": self.controlnets, "ip_adapter": self.ip_adapters}
        return {word: one.given for word, one in found.items() if one is not None}

    def check_settings(self, settings: Settings) -> None:
        """Raise ConfigError for settings that do not go with this engine's."""
        if self.controlnets is not None:
            self.controlnets.check(settings)
        word = self.placement.makes_code
        require(not (word and settings.step_cache), f"compiled code computes all: leave {word} out", "step_cache")

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise ModelError where a LoRA does not fit the model; reads headers alone."""
        if self.quantization and adapters:
            raise ConfigError("LoRAs are merged into weights of 16 bits", where="quantization", hint=EITHER)
        self._adapters.check(adapters, self.model, self.prediction_type, self.text_encoders)

    def load(self, dtype: torch.dtype | None = None) -> Model:
        """The model, from the cache of loaded ones where it is there."""
        if isinstance(self.model, Model):
            return self.model
        place, dtype = self.placement.home, dtype or self.dtype
        if self.placement.offload and not self._told_memory:
            self._tell_memory(self.model, dtype)
        options = {"prediction_type": self.prediction_type, "text_encoders": self.text_encoders}
        options |= {"quantization": self.quantization}
        return load_model(self.model, place, dtype, vae=self.vae, **options)

    def _tell_memory(self, model: str | os.PathLike, dtype: torch.dtype) -> None:
        """Say, before the weights are read, where they will be."""
        self._told_memory = True
        shapes, eight = weight_shapes(model, self.vae, self.text_encoders), self.quantization
        memory, kind = memory_of(shapes, dtype.itemsize, eight), f" and {eight}" if eight else ""
        console.say(f"memory: weights in {dtype_name(dtype)}{kind}, {offload_line(memory, self.placement.offload)}")

    @functools.cached_property
    def other_parts(self) -> dict[str, Any]:
        """The files in place of the model's own parts, or of those that it lacks, and how weights are read, for the
        image's metadata.

        Their paths are absolute; what they hold is in the model's hash.
        """
        found: dict[str, Any] = {}
        if self.vae is not None:
            found["vae"] = str(Path(self.vae).resolve())
        if self.text_encoders:
            found["text_encoders"] = [str(path.resolve()) for path in listed_texts(self.text_encoders)]
        if self.quantization:
            found["quantization"] = self.quantization
        if self.prediction_type is not None:
            found["prediction_type"] = self.prediction_type
        if self.allow_unapplied:
            found["allow_unapplied"] = True
        return found

    def load_beside(self) -> None:
        """Load ControlNets and IP-Adapters, which drawing does too. Raises ModelError."""
        for networks in (self.controlnets, self.ip_adapters):
            if networks is not None:
                networks.load(self.placement, self.load().dtype)

    def unload_beside(self) -> None:
        """Free the memory of ControlNets and IP-Adapters; they are loaded again when they are needed."""
        for networks in (self.controlnets, self.ip_adapters):
            if networks is not None:
                networks.unload()

    def adapted(self, model: Model, adapters: tuple[Adapter, ...]) -> Model:
        """A loaded model with these LoRAs, and with the attention of this engine."""
        model = self.placement.model(model)
        return self._adapters.model(model, adapters) if adapters else model

    def generate(
        self,
        settings: Settings,
        requests: Sequence[ImageRequest],
        batch_size: int,
        watch: Callable[[Sequence[int], int, torch.Tensor, torch.Tensor], Any],
    ) -> Iterator[tuple[int, Image.Image, dict[str, Any]]]:
        """(number of the request, its image, what the image's metadata has to add) of each, in no certain order.

        `watch` is called as (numbers, i, x, x0) after step i of each batch. A batch that memory has no room for is
        drawn in halves, and begins anew; so are those of its size from then on. An image that is NaN is drawn again in
        fp32, alone. Raises NumericsError where that does not help, ResourceError where one image has no room.
        """
        model = self.load()
        waiting = deque(self._batches(model, settings, requests, min(batch_size, self._fitting(settings))))
        while waiting:
            rows = waiting.popleft()
            batch = [requests[row] for row in rows]
            adapted = self.adapted(model, batch[0].adapters)
            try:
                images = self.generate_batch(adapted, settings, batch, partial(watch, rows))
            except ResourceError as error:
                half = self._halve(settings, rows, error)
                waiting = deque(part for one in (rows, *waiting) for part in batched(one, half))
                continue
            added = {key: value for key, value in adapted.info.items() if key == "lora"}
            added |= self._metadata_of_attached() | self.other_parts
            for row, image, finite in zip(rows, images, torch.isfinite(images).flatten(1).all(1)):
                if finite:
                    yield row, to_pil(image[None])[0], added
                else:
                    yield row, self._generate_in_fp32(settings, requests[row]), {**added, "dtype": "fp32"}

    @torch.no_grad()
    def generate_batch(
        self, model: Model, settings: Settings, requests: Sequence[ImageRequest], watch: Watch | None = None
    ) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] on the CPU, with a model that has their LoRAs; one that overflows is NaN.

        Raises ResourceError out of memory, with nothing held.
        """
        s, place, schedule = settings, self.placement, model.schedule
        exact = self.device.type == "cuda" and self.dtype == torch.float32
        guidance = replace(s.guidance, scale=tuple(request.cfg_scale for request in requests))
        edited, start, images = requests[0].source is not None, Start(), torch.empty(0)  # all of a batch or none
        with out_of_memory(s, len(requests)), without_tf32() if exact else nullcontext():
            if edited:
                start = encode_init_images(model, place, s, requests)
            for run in s.runs:
                if run is not s.runs[0]:  # hires-fix
                    start = enlarge(model, place, s, run, images)
                    requests, watch = [replace(one, latents=None) for one in requests], offset_steps(watch, s.runs[0])
                cond, uncond = self._encoder_of(model).conditions(requests, run.steps, s.clip_skip, s.emphasis)
                noise, x = draw_noise(model.vae, requests, run, place.device)
                adapters = self.ip_adapters
                shown = None if adapters is None else adapters.prompted(place, s, requests, run, model.dtype)
                with place.on(model.unet) as unet:
                    steering = None if s.control is None else self._steering(s, run, requests, model.dtype)
                    unet = unet if steering is None else steering.unet(unet)
                    beside = None if shown is None else ImageAttention(unet, shown, (x.shape[2], x.shape[3]))
                    network = network_of(unet, run, requests, s.step_cache, beside, place.compiled(unet))
                    network = network if start.masked is None else start.network(network)
                    network = network if steering is None else steering.network(network)
                    denoise = guided_denoiser(network, cond, uncond, guidance, schedule, run.sigmas, model.dtype)
                    denoise = denoise if steering is None else steering.following(denoise)
                    sampling = partial(sample, denoise, schedule, run.sigmas, x, s.sampler, spacing=s.spacing)
                    x0 = sampling(noise=noise, eta=s.eta, callback=watch, original=start.original)
                with place.on(model.vae) as vae:
                    images = decode(vae, x0, s.tile(vae.factor, run.height, run.width))
            return composite(images, requests) if edited else images

    def _fitting(self, settings: Settings) -> int:
        """How many images of this size memory has had room for, as far as that is known."""
        area = settings.height * settings.width
        return min((count for pixels, count in self._room.items() if pixels <= area), default=MAX_IMAGES)

    def _halve(self, settings: Settings, rows: Sequence[int], error: ResourceError) -> int:
        """Half as many images, which batches of this size and of larger ones have from now on; one alone: the error."""
        if len(rows) == 1:
            error.row = rows[0]
            raise error
        half = self._room[settings.height * settings.width] = len(rows) // 2
        size = f"{len(rows)} x {settings.width}x{settings.height}"
        console.warn(f"out of memory at {size}: going on with {half} together")
        return half

    def hashes_of_attached(self) -> dict[str, list[str]]:
        """sha256 of each file that works beside the model, by the keyword that gave it."""
        found: dict[str, list[str]] = {}
        if self.controlnets is not None:
            found["controlnet"] = [one["hash"] for one in self.controlnets.metadata]
        if self.ip_adapters is not None:
            files = self.ip_adapters.metadata
            found["ip_adapter"] = [*(one["hash"] for one in files["ip_adapter"]), files["image_encoder"]["hash"]]
        return found

    def _metadata_of_attached(self) -> dict[str, Any]:
        found = {} if self.controlnets is None else {"controlnet": self.controlnets.metadata}
        return found if self.ip_adapters is None else {**found, **self.ip_adapters.metadata}

    def _steering(self, settings: Settings, run: Run, requests: Sequence[ImageRequest], dtype: torch.dtype) -> Steering:
        """The ControlNets at work for one run of a batch."""
        assert self.controlnets is not None and settings.control is not None  # as the request was checked
        nets = self.controlnets.at_work(self.placement, dtype)
        ready = partial(prepared, run=run)
        return Steering(nets, ready, settings.control, requests, run, self.placement.device)

    def _batches(
        self, model: Model, settings: Settings, requests: Sequence[ImageRequest], size: int
    ) -> list[list[int]]:
        """Which requests are drawn together: at most `size`, of the same LoRAs, chunks of text, kind of begin, and
        steps at which a step cache is renewed."""
        groups: dict[tuple, list[int]] = {}
        runs = [run.steps for run in settings.runs]
        chunks = cache(lambda prompts: [self._tokens.chunks(model.text, prompts, steps) for steps in runs])
        for row, request in enumerate(requests):
            alike = request.adapters, request.form, request.renewals(settings), *chunks(request.prompts)
            groups.setdefault(alike, []).append(row)
        return [part for rows in groups.values() for part in batched(rows, size)]

    def _generate_in_fp32(self, settings: Settings, request: ImageRequest) -> Image.Image:
        """An image once more; raises NumericsError where fp32 was used already or does not help."""
        hint = "check the model's weights" if self.dtype == torch.float32 else "use dtype fp32"
        if self.dtype != torch.float32 and not isinstance(self.model, Model):
            console.warn(f"seed {request.seed}: NaN in {dtype_name(self.dtype)}, drawing it again in fp32")
            model = self.adapted(self.load(torch.float32), request.adapters)
            try:
                return to_pil(self.generate_batch(model, settings, [request]))[0]
            except NumericsError:
                hint = "check the model's weights"
        what = f"the image of {request.prompt.text[:60]!r}, seed {request.seed}, holds NaN or infinity"
        raise NumericsError(what, hint=hint)

    def _encoder_of(self, model: Model) -> Encoder:
        """The encoder of a model's texts, with what it has encoded already where it was the last."""
        if self._encoder is None or self._encoder.text is not model.text:
            self._encoder = Encoder(model.text, self._tokens, self.placement, model.dtype)
        return self._encoder


def network_of(
    unet: UNet | MMDiT,
    run: Run,
    requests: Sequence[ImageRequest],
    step_cache: int | None = None,
    beside: ImageAttention | None = None,
    compiled: CompiledUNet | None = None,
) -> Callable[..., torch.Tensor]:
    """The network for one run of a batch; LCM's and FLUX.1-dev's gets the images' guidance scales. `step_cache`: as in
    Settings; `beside`: of IP-Adapters; `compiled`: the U-Net's compiled code, which is called in its place."""
    network: Callable[..., torch.Tensor] = compiled or unet
    if isinstance(unet, UNet):
        network = prepared(unet, run, beside) if compiled is None else partial(compiled, **sizes_of(unet, run))
    network = network if beside is None else beside.network(network)
    if step_cache:
        network = partial(network, deep=StepCache(step_cache))
    if unet.config.embeds_guidance:
        return told_scales(network, [request.guidance_scale for request in requests])
    return network


def prepared(unet: UNetEncoder, run: Run, beside: ImageAttention | None = None) -> Callable[..., Any]:
    """A U-Net or a ControlNet for one run; XL's gets the image's original size, its crop (none) and its target size."""
    cache = unet.prepare()
    cache.beside = beside
    return partial(unet, cache=cache, **sizes_of(unet, run))


def sizes_of(unet: UNetEncoder, run: Run) -> dict[str, Any]:
    """XL's input of sizes; none of other networks."""
    if unet.config.addition_embed_type != "text_time":
        return {}
    h, w = run.height, run.width
    sizes = torch.tensor((h, w, 0, 0, h, w), dtype=torch.float32, device=next(unet.parameters()).device)
    return {"time_ids": sizes}


def told_scales(network: Callable[..., torch.Tensor], scales: Sequence[float]) -> Callable[..., torch.Tensor]:
    """A network with the guidance's scale as an input that is told that of each image, in every call."""
    values = torch.tensor(scales)

    def call(x: torch.Tensor, *inputs: Any, **more: Any) -> torch.Tensor:
        return network(x, *inputs, guidance=values.repeat(len(x) // len(values)).to(x.device), **more)

    return call


def offset_steps(watch: Watch | None, first: Run) -> Watch | None:
    """`watch` for a second run, whose steps are counted on from the first's."""
    return None if watch is None else lambda i, x, x0: watch(first.steps + i, x, x0)


@contextmanager
def out_of_memory(settings: Settings, batch: int) -> Iterator[None]:
    """Turn running out of memory into ResourceError, after what the failed batch held is let go."""
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    let_go()
    hint = f"use a smaller batch_size than {batch}" if batch > 1 else "use a smaller size or a smaller dtype"
    raise ResourceError(f"out of memory at {batch} x {settings.width}x{settings.height}", hint=hint)


def _place(model: Any, device: Any, dtype: Any, offload: bool | str) -> tuple[torch.device, torch.dtype]:
    """The device and dtype to use; those of a model that is loaded already (its dtype alone where parts are lent)."""
    picked = pick_device(str(device))  # torch's own objects are taken too
    picked_dtype = pick_dtype(dtype, picked)
    if isinstance(model, (str, os.PathLike)):
        return picked, picked_dtype
    return _place_of_loaded(model, device, dtype, offload, picked, picked_dtype)


def _place_of_loaded(
    model: Any, device: Any, dtype: Any, offload: bool | str, picked: torch.device, picked_dtype: torch.dtype
) -> tuple[torch.device, torch.dtype]:
    if not isinstance(model, Model):
        raise ConfigError(f"expected a name, a path or a loaded model, got {type(model).__name__}", where="model")
    if str(device) != "auto" and model.device.type != picked.type and not offload:
        raise ConfigError(f"the given model is on {model.device}, not {picked}", where="device")
    if dtype != "auto" and model.dtype != picked_dtype:
        raise ConfigError(f"the given model is loaded in {dtype_name(model.dtype)}", where="dtype")
    return picked if offload else model.device, model.dtype


def _check_quantized(kind: str, model: Any, info: ModelInfo) -> None:
    """Raise ConfigError where weights are not kept in 8 bits: of U-Nets, of what is loaded already, without torchao."""
    if isinstance(model, Model):
        raise ConfigError("a loaded model has its weights already", where="quantization")
    if info.transformer is None:
        raise ConfigError("is for SD3 and FLUX, and this is a U-Net", where="quantization", hint="leave it out")
    check_quantization(kind)


def _check_replaced(model: Any, vae: Any) -> None:
    """Raise ConfigError or ModelError where a model's VAE or prediction type cannot be replaced."""
    if vae is not None and not isinstance(vae, (str, os.PathLike)):
        raise ConfigError(f"expected a folder or a file, got {type(vae).__name__}", where="vae")
    if vae is not None and isinstance(model, Model):
        raise ConfigError("a loaded model has its VAE already", where="vae")
    if vae is not None and not Path(vae).exists():
        raise ModelError("no such VAE", where=vae)
    if isinstance(model, Model):
        raise ConfigError("a loaded model has its schedule already", where="prediction_type")


def batched(rows: list[int], size: int) -> list[list[int]]:
    """Rows in lists of at most `size`."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def decode(vae: VAE, latents: torch.Tensor, tile: int | None = None) -> torch.Tensor:
    """Latents (B, C, h, w) -> images (B, 3, H, W) on the CPU; one that is not finite becomes NaN as a whole.

    What memory has no room for is decoded one by one, and what it has none for alone in tiles.
    """
    together = 1 if latents.is_cpu else max(1, DECODED_AT_ONCE // latents[0, 0].numel())
    return torch.cat([_decoded(vae, part, tile) for part in latents.split(together)])


def _decoded(vae: VAE, latents: torch.Tensor, tile: int | None) -> torch.Tensor:
    try:
        return vae.decode(latents, tile).float().cpu()
    except NumericsError:
        finite = False
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or (len(latents) == 1 and tile is not None):
            raise
        finite = True
    return _decoded_by_parts(vae, latents, tile, finite)


def _decoded_by_parts(vae: VAE, latents: torch.Tensor, tile: int | None, finite: bool) -> torch.Tensor:
    """One by one, as one image's failure is not the batch's; one alone as NaN, or in tiles where memory ran out."""
    if len(latents) == 1 and not finite:
        h, w = latents.shape[2:]
        return torch.full((1, 3, h * vae.factor, w * vae.factor), float("nan"))
    if len(latents) == 1:
        console.warn("out of memory in decoding an image: decoding it in tiles")
        tile = TILE
    let_go()
    return torch.cat([_decoded(vae, one, tile) for one in latents.split(1)])
