"""Pipeline: prompts and a model, checked; generate: images from them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm import console
from ldm.checkpoint import Model, card_of, save_model
from ldm.checkpoint.describe import text_without_weights
from ldm.checkpoint.folder import card_with
from ldm.device import dtype_name
from ldm.errors import ConfigError, LdmError
from ldm.pipeline.adapters import Adapter, take_adapters, with_few_steps
from ldm.pipeline.checks import check_bool, check_negative, check_prompts
from ldm.pipeline.control import control_warnings
from ldm.pipeline.encode import check_plain_prompts
from ldm.pipeline.engine import Engine
from ldm.pipeline.fast import check_beside, fast_adapter
from ldm.pipeline.inside import AttentionMaps, Denoiser, attention_maps, check_keywords, make_denoiser
from ldm.pipeline.keywords import CONTROL_WORDS, EDITING_WORDS, GUIDANCE_WORDS, SHOWN_WORDS, resolve_aliases
from ldm.pipeline.metadata import make_metadata, text_reports, warnings_of
from ldm.pipeline.request import ImageRequest, Request, check_request, size_warnings
from ldm.pipeline.result import Images
from ldm.pipeline.stream import Listener, Step, stream
from ldm.prompts import Prompt

OF_PIPELINE: tuple[str, ...] = ("prompt", "model", "negative_prompt", "lora", "lora_dir", "allow_unapplied", "vae")
OF_PIPELINE += ("controlnet", "ip_adapter", "image_encoder", "dora_scaling", "prediction_type", "device", "dtype")
OF_PIPELINE += ("offload", "attention", "compile", "backend", "fast", "text_encoders", "quantization")
OF_GENERATE: tuple[str, ...] = ("num_images", "seed", "num_inference_steps", "guidance_scale", "height", "width")
OF_GENERATE += ("sampler", "spacing", "timesteps", "sigmas", "eta", "clip_skip", "emphasis", "strict", "latents")
OF_GENERATE += ("true_cfg_scale", "step_cache", "callback", "batch_size")
OF_GENERATE += (*GUIDANCE_WORDS, *EDITING_WORDS, *CONTROL_WORDS, *SHOWN_WORDS)


class Pipeline:
    """Draws images of `prompt`, a text or a list of texts.

    prompt           what to draw; up to 100,000 characters each, with A1111's (word:1.3), BREAK, [a:b:0.5], [a|b]
    model            "default", a diffusers folder, a single .safetensors file, a hub id, or a loaded model
    negative_prompt  what to keep away from: one text, or one for each prompt
    lora             LoRA files for every prompt: a path, (path, weight), (path, weight, text weight), or a list
    lora_dir         where <lora:name:0.8> in a prompt finds name.safetensors, for that prompt alone
    allow_unapplied  whether keys of a LoRA that have no place in the model are a warning instead of an error
    dora_scaling     how weights act on a DoRA: linear (A1111, ComfyUI) or peft (inside its norm, as PEFT has it)
    vae              another VAE's folder or file in place of the model's own
    text_encoders    what a single file of SD3 or FLUX lacks of CLIP-L, CLIP-G, T5 and T5's tokenizer: files, folders
    controlnet       the folder, file or hub id of a ControlNet or T2I-Adapter, or a list of them, or the name of a
                     control that the model comes with (edges)
    ip_adapter       an IP-Adapter's .safetensors file, or a list of them, which show images to the model
    image_encoder    the folder or hub id of the CLIP vision tower that they look through (the folder image_encoder
                     beside them, or of the model)
    prediction_type  epsilon, v_prediction or sample, where the model does not say it or says it wrongly
    device, dtype    auto, cpu, cuda, mps; auto, fp32, bf16, fp16, or torch's names and objects for these
    offload          whether parts are kept in main memory, and on the device only while they work; "blocks": a flow
                     transformer's blocks too, one at a time, for models that are larger than the device's memory
    quantization     int8: the weights of a flow transformer's blocks in 8 bits, by torchao (extra `int8`); not exact
    attention        of the network: auto, or sdpa, chunked, xformers
    compile          whether the U-Net is compiled by torch.compile, which needs a C++ compiler on a CPU and a minute or
                     more for each size, once: what is made is kept. Images are not the same to the bit as without it
    backend          torch, or openvino (extra `openvino`): on a CPU the U-Net's code is OpenVINO's, made for each size
    fast             whether the default model draws in few steps, with its shipped few-step LoRA and its settings
    diffusers' and A1111's names of these are accepted too (see ldm.pipeline.keywords.ALIASES).

    Settings are checked here and no weight is read: ConfigError names the setting, ModelError what is wrong with the
    model's folder. Loaded models are shared between pipelines. A pipeline may be used by several threads: their calls
    run one after another.
    """

    def __init__(
        self,
        prompt: str | Sequence[str],
        model: str | os.PathLike | Model = "default",
        *,
        negative_prompt: str | Sequence[str] | None = "",
        lora: Any = None,
        lora_dir: str | os.PathLike | None = None,
        allow_unapplied: bool = False,
        dora_scaling: str = "linear",
        vae: str | os.PathLike | None = None,
        text_encoders: Any = None,
        controlnet: Any = None,
        ip_adapter: Any = None,
        image_encoder: str | os.PathLike | None = None,
        prediction_type: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        offload: bool | str = False,
        quantization: str | None = None,
        attention: str = "auto",
        compile: bool = False,
        backend: str = "torch",
        fast: bool = False,
        **other: Any,
    ):
        own = {name: value for name, value in locals().items() if name in OF_PIPELINE and name != "prompt"}
        given = resolve_aliases(other, own, other=OF_GENERATE) if other else own
        texts = check_prompts(prompt)
        negatives = check_negative(given.pop("negative_prompt"), len(texts))
        lora, lora_dir, fast = given.pop("lora"), given.pop("lora_dir"), check_bool(given.pop("fast"), "fast")
        self._everywhere: tuple[Adapter, ...] = ()
        self._adapters: tuple[tuple[Adapter, ...], ...] = ((),) * len(texts)
        if lora or lora_dir is not None or any("<" in text for text in (*texts, *negatives) if text):
            texts, self._everywhere, self._adapters = take_adapters(texts, negatives, lora, lora_dir)
        if fast:
            self._take_fast(given["model"], given["vae"])
        self._prompts = _parsed("prompt", texts)
        self._negatives = _parsed("negative_prompt", negatives)
        self._engine = Engine(**given)
        if any(self._adapters):
            self._engine.check([adapter for adapters in self._adapters for adapter in adapters])
        self._lock = threading.RLock()
        self._warned: set[str] = set()

    def _take_fast(self, model: Any, vae: Any) -> None:
        check_beside(self._adapters)
        shipped = fast_adapter(model, vae)
        self._everywhere = (shipped, *self._everywhere)
        self._adapters = tuple((shipped, *adapters) for adapters in self._adapters)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Without their LoRA tags."""
        return tuple(prompt.text for prompt in self._prompts)

    @property
    def negative_prompts(self) -> tuple[str | None, ...]:
        return tuple(None if prompt is None else prompt.text for prompt in self._negatives)

    @property
    def model(self) -> str | os.PathLike | Model:
        """As it was given."""
        return self._engine.model

    @property
    def device(self) -> torch.device:
        return self._engine.device

    @property
    def dtype(self) -> torch.dtype:
        return self._engine.dtype

    def __repr__(self) -> str:
        name = self.model if isinstance(self.model, (str, os.PathLike)) else self.model.name
        return f"<Pipeline {list(self.prompts)!r:.60} of {name}, {self.device}, {dtype_name(self.dtype)}>"

    def generate(
        self,
        *,
        num_images: int | None = None,
        seed: int | Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        guidance: str = "cfg",
        height: int | None = None,
        width: int | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float | None = None,
        true_cfg_scale: float | None = None,
        clip_skip: int | None = None,
        emphasis: str = "original",
        step_cache: int | None = None,
        strict: bool = False,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        outpaint: Mapping[str, int] | None = None,
        variation_seed: int | Sequence[int] | None = None,
        variation_strength: float | None = None,
        hires_scale: float | None = None,
        hires_steps: int | None = None,
        hires_strength: float | None = None,
        control_image: Any = None,
        controlnet_conditioning_scale: float | Sequence[float] | None = None,
        control_guidance_start: float | Sequence[float] | None = None,
        control_guidance_end: float | Sequence[float] | None = None,
        control_mode: int | Sequence[int | Sequence[int] | None] | None = None,
        guess_mode: bool = False,
        ip_adapter_image: Any = None,
        ip_adapter_scale: Any = None,
        ip_adapter_mask: Any = None,
        vae_tiling: bool | str = "auto",
        latents: torch.Tensor | None = None,
        callback: Callable[[int, torch.Tensor, torch.Tensor], Any] | Listener | None = None,
        batch_size: int | None = None,
        **other: Any,
    ) -> Images:
        """Draw `num_images` images of each prompt, prompt by prompt; None leaves a setting to the model.

        guidance    cfg, apg, pag or cfg_zero; with guidance_rescale, guidance_interval=(from, to) in fractions of the
                    steps (or half, most) or guidance_sigma_interval (or xl), and the options of its kind
                    (ldm.diffusion.guidance.Guidance)
        guidance_scale  one number, or a list with one for each image; 1 and less: none, half the work in batches
        seed        image k of every prompt has seed + k; a list holds one for each image; None or -1 draws one
        sampler     by our name or anybody's, "DPM++ 2M Karras" included (`ldm generate --help-samplers` lists them)
        timesteps   or sigmas: the noise levels themselves, descending, in place of a number of steps and a spacing
        eta         0 to 1, how much noise samplers that have this number add
        true_cfg_scale  of FLUX: classifier-free guidance with the negative prompt (1: none); its guidance_scale is an
                    input of the network
        clip_skip   layers of CLIP that are left out at its end, counted as diffusers does (A1111's number less 1)
        emphasis    how (word:1.3) acts: original (the mean is restored, as in A1111) or no_norm
        step_cache  N: a U-Net's deep features are computed in every N-th step and reused by the others; faster, inexact
        strict      whether words that the model never saw, or brackets left open, are errors instead of warnings
        image       an image or its file, or a list with one for each prompt, to begin at; its size is drawn
        mask_image  likewise, of the same size: white is painted, grey counts as what it is nearer to, and where it is
                    black the very pixels of the image stay; for every model, and needed by those with 9 channels
        strength    above 0 to 1: how much of the steps is run on an image (0.8, with outpaint 1)
        outpaint    {"left": 64, …}: how many pixels the image grows at left, right, top and bottom
        variation_seed, variation_strength  above 0 to 1: how far the first noise is mixed with that of another seed;
                    then every image of a prompt has the same seed, and image k has variation_seed + k
        hires_scale draw, make the image so many times larger, and draw on for hires_strength (the model's, or
                    0.7) of hires_steps (as many as before)
        control_image  what each ControlNet looks at: an image, its file, or "edges:photo.png" for a condition that is
                    made here (ldm.control.KINDS); with one ControlNet a list has one for each prompt, with several one
                    for each ControlNet. It is resized to the size that is drawn, which has its proportions and as many
                    pixels as the model was trained on where nothing else decides it
        controlnet_conditioning_scale, control_guidance_start, control_guidance_end  how much ControlNets do (1), and in
                    which part of the steps (0 to 1): one number, or one for each control image
        control_mode  what a ControlNet Union looks at, by its number: one for each ControlNet, None for those without
                    kinds. A list of several for one union mixes them: it sees as many control images at once
        guess_mode  ControlNets act on the answer with the prompt alone, and less at high resolutions
        ip_adapter_image  what the IP-Adapter shows: an image, its file, or with one prompt a list of them; with several
                    prompts a list has one for each, with several adapters one for each; each may be a list again
        ip_adapter_scale  how much it does (1): a number, or a mapping of levels as diffusers has it, such as
                    {"up": {"block_0": [0, 1, 0]}}, where what is not named is 0; one for each adapter, or a list of
                    numbers for images with masks
        ip_adapter_mask  where each image acts, as many as there are: white, not black
        vae_tiling  True, False or "auto": the VAE works in tiles (with auto above 1024x1024 pixels)
        latents     unit-variance starting noise (images, C, h, w) in place of the seeds'
        callback    called as (i, x, x0) after step i of each batch, x and x0 (B, C, h, w); where it returns True the
                    work ends, and the result holds the images that are finished
        batch_size  how many images are denoised together; their bits do not depend on it
        diffusers' and A1111's names are accepted too (see ldm.pipeline.keywords.ALIASES).

        Raises ConfigError before any weight is read; ModelError; NumericsError where an image is NaN in fp32 too;
        ResourceError out of memory. Whatever stops a call part-way carries the finished images as `.images`.
        """
        own = {**dict.fromkeys(GUIDANCE_WORDS), **{k: v for k, v in locals().items() if k in OF_GENERATE}}
        engine, given = self._engine, resolve_aliases(other, own, OF_PIPELINE) if other else own
        info = with_few_steps(engine.info, self._adapters) if any(self._adapters) else engine.info
        given = {**given, **engine.attached}
        if engine.controlnets is not None:
            given = engine.controlnets.with_modes(given, len(self._prompts))
        call = check_request(given, len(self._prompts), info)
        engine.check_settings(call.settings)
        requests = self._requests(call)
        with self._lock:
            if call.strict:
                self._refuse_unseen(call, requests)
            metadata = make_metadata(engine.load(), engine.placement, call.settings, requests, info.few)
            self._warn(call, metadata, () if info.few is None else info.few.remarks(given))
            images: dict[int, Any] = {}
            steps = sum(run.steps for run in call.settings.runs)  # of a batch
            steps *= -(-len(requests) // call.batch_size)  # more where batches are parted
            try:
                with console.progress(total=steps, desc="drawing", unit="step") as bar:
                    watch = _watching(call.callback, bar)
                    for row, image, added in engine.generate(call.settings, requests, call.batch_size, watch):
                        images[row] = image
                        metadata[row] |= added
            except Stopped:
                console.say(f"stopped by the callback, {len(images)} of {len(requests)} images are finished", 1)
            except (LdmError, KeyboardInterrupt) as error:
                stop: Any = error
                stop.images = _in_order(images, metadata)
                raise
            return _in_order(images, metadata)

    def _requests(self, call: Request) -> list[ImageRequest]:
        """One for each image of the call, prompt by prompt. Raises ConfigError for prompts that the model refuses."""
        none, settings = (None,) * len(call.seeds), call.settings
        latents = none if call.latents is None else call.latents
        sources = none if call.sources is None else call.sources.fitted(settings.height, settings.width)
        prompts = [one for one in zip(self._prompts, self._negatives, self._adapters) for _ in range(call.num_images)]
        nothing: Sequence[Any] = ((),) * len(call.seeds)
        each = (settings.true_cfg_scale,) * len(call.seeds), call.controls or nothing, call.shown or nothing
        own = zip(prompts, call.seeds, call.guidance_scales, latents, call.variations or none, sources, *each)
        requests = [ImageRequest(p, n, seed, scale, loras, *more) for (p, n, loras), seed, scale, *more in own]
        if self._engine.info.t5:
            check_plain_prompts(requests, settings)
        return requests

    def _refuse_unseen(self, call: Request, requests: Sequence[ImageRequest]) -> None:
        """Raise ConfigError for what the model does not see of the prompts."""
        encoder = text_without_weights(self._engine.model, self._engine.prediction_type, self._engine.text_encoders)
        for line in warnings_of(text_reports(encoder, call.settings, requests)):
            raise ConfigError(line, where="prompt", hint="change the prompt, or leave strict out")

    def _warn(self, call: Request, metadata: Sequence[dict], remarks: Iterable[str]) -> None:
        """Warn of what the model does not see of the prompts and, once, of sizes that it was not trained on."""
        for line in remarks:
            self._warn_once(line)
        for line in warnings_of(metadata):
            console.warn(line)
        for emoji, name in {pair for one in metadata for pair in one.get("named", {}).items()}:
            console.say(f"{emoji} is read as {name!r}: the model was trained on words")
        settings = call.settings
        for line in () if call.sources is None else call.sources.resized(settings.height, settings.width):
            console.say(line)
        if any(run.area != self._engine.info.side**2 for run in settings.runs):
            for line in size_warnings(settings, self._engine.info):
                self._warn_once(line)
        for line in control_warnings(call.controls) if call.controls else ():
            self._warn_once(line)

    def _warn_once(self, line: str) -> None:
        if line not in self._warned:
            self._warned.add(line)
            console.warn(line)

    def stream(self, **settings: Any) -> Iterator[Step]:
        """As generate, giving each step as it happens: `for step in pipe.stream(): step.preview`.

        A Step has .index, .rows (which images), .x0, .preview and .previews, small images of what is to come; the
        last step is given once more, with the finished images as .images. Leaving the loop stops the work. What
        generate raises is raised by the loop.
        """
        callback = settings.pop("callback", None)
        return stream(
            lambda listener: self.generate(**settings, callback=listener), callback, lambda: self._engine.load().vae
        )

    def denoiser(self, **settings: Any) -> Denoiser:
        """The model under these prompts as a sampler sees it: `denoiser(x, sigma)` -> x0, tensors (B, C, h, w).

        Takes generate's settings but for editing, batches and callbacks. `.start`, `.sigmas`, `.sample(sampler)`,
        `.encode(image)` and `.decode(latents)` make an image of it step by step. Raises as generate does.
        """
        check_keywords(settings)
        if self._engine.controlnets is not None or self._engine.ip_adapters is not None:
            raise ConfigError("a denoiser has no ControlNets and IP-Adapters", where="denoiser", hint="leave them out")
        given = resolve_aliases(settings, dict.fromkeys(OF_GENERATE), OF_PIPELINE) | {"strict": False}
        info = with_few_steps(self._engine.info, self._adapters) if any(self._adapters) else self._engine.info
        call = check_request(given, len(self._prompts), info)
        with self._lock:
            return make_denoiser(self._engine, call.settings, self._requests(call))

    def attention_maps(self, **settings: Any) -> AttentionMaps:
        """Draw one image and see what its cross-attention looks at: `maps["cat"]` (h, w), `maps.overlay("cat")`.

        `.image` is the one that generate draws with these settings, `.words` are the prompt's, `.steps` (n, words, h,
        w) the maps at each step (Tang et al. 2023). Takes what `denoiser` takes. Raises ConfigError for several images,
        prompts that change from step to step, and models that have no U-Net or read with T5.
        """
        return attention_maps(self.denoiser(**settings))

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the model as a diffusers folder in this pipeline's dtype, model card included, and return its path.

        The LoRAs of `lora` are merged into it, those of tags in prompts are not. What was made for few steps keeps the
        settings to draw with, in the card.
        """
        if self._engine.quantization:
            raise ConfigError("weights of 8 bits cannot be saved", where="quantization", hint="leave it out")
        info = with_few_steps(self._engine.info, [self._everywhere])
        with self._lock:
            model = self._engine.adapted(self._engine.load(), self._everywhere)
            card = card_of(model) if info.few is None else card_with(card_of(model), info.card)
            return save_model(model, folder, dtype=model.dtype, readme=card)


class Stopped(Exception):
    """The callback asked for the end of the work."""


def _watching(callback: Callable | None, bar: Any) -> Callable:
    """What is called after each step of a batch: the bar, then the user's callback."""

    def watch(rows, i, x, x0):
        bar.update()
        told = (rows, i, x, x0) if isinstance(callback, Listener) else (i, x, x0)
        if callback is not None and callback(*told) is True:
            raise Stopped

    return watch


def _in_order(images: Mapping[int, Any], metadata: Sequence[dict]) -> Images:
    """The finished images (row -> image) with their metadata."""
    return Images([images[row] for row in sorted(images)], [metadata[row] for row in sorted(images)])


def _parsed(where: str, texts: Sequence[str | None]) -> tuple[Any, ...]:
    places = [f"{where}[{i}]" if len(texts) > 1 else where for i in range(len(texts))]  # as messages call them
    return tuple(None if text is None else Prompt.parse(text, place) for text, place in zip(texts, places))
