"""Pipeline: prompts and a model, checked; generate: pictures from them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import console
from ldm.errors import ConfigError, LdmError
from ldm.pipeline.adapters import take_adapters
from ldm.pipeline.checks import check_negative, check_prompts
from ldm.pipeline.drawing import ImageRequest
from ldm.pipeline.engine import Engine
from ldm.pipeline.keywords import EDITING_WORDS, GUIDANCE_WORDS, canonical
from ldm.pipeline.metadata import dtype_name, make_records, too_large, warnings_of
from ldm.pipeline.request import Request, check_request
from ldm.pipeline.result import Images
from ldm.pipeline.stream import Listener
from ldm.prompts import check

if TYPE_CHECKING:
    import torch

    from ldm.checkpoint import Model
    from ldm.checkpoint.describe import ModelInfo
    from ldm.pipeline.stream import Step

OWN = ("prompt", "model", "negative_prompt", "lora", "lora_dir", "allow_unapplied", "vae", "prediction_type")
OWN += ("device", "dtype", "offload", "attention")
CALL = ("num_images", "seed", "num_inference_steps", "guidance_scale", "height", "width", "sampler", "spacing")
CALL += ("timesteps", "sigmas", "eta", "clip_skip", "emphasis", "strict", "latents", "callback", "batch_size")
CALL += (*GUIDANCE_WORDS, *EDITING_WORDS)


class Pipeline:
    """Draws pictures of `prompt`, a text or a list of texts.

    prompt           what to draw; up to 100,000 characters each, with A1111's (word:1.3), BREAK, [a:b:0.5], [a|b]
    model            "default", a diffusers folder, a single .safetensors file, a hub id, or a loaded model
    negative_prompt  what to keep away from: one text, or one for each prompt
    lora             LoRA files for every prompt: a path, (path, weight), or a list of these
    lora_dir         where <lora:name:0.8> in a prompt finds name.safetensors, for that prompt alone
    allow_unapplied  whether keys of a LoRA that have no place in the model are a warning instead of an error
    vae              another VAE's folder or file in place of the model's own
    prediction_type  epsilon, v_prediction or sample, where the model does not say it or says it wrongly
    device, dtype    auto, cpu, cuda, mps; auto, fp32, bf16, fp16
    offload          whether parts are kept in main memory, and on the device only while they work
    attention        of the U-Net: auto, or sdpa, chunked, xformers
    diffusers' and A1111's words for these are taken too (see ldm.pipeline.keywords.ALIASES).

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
        vae: str | os.PathLike | None = None,
        prediction_type: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        offload: bool = False,
        attention: str = "auto",
        **other: Any,
    ):
        own = {name: value for name, value in locals().items() if name in OWN and name != "prompt"}
        given = canonical(other, own, other=CALL)
        prompts = check_prompts(prompt)
        self.negative_prompts = check_negative(given.pop("negative_prompt"), len(prompts))
        lora, lora_dir = given.pop("lora"), given.pop("lora_dir")
        self.prompts, self._everywhere, self._adapters = take_adapters(prompts, self.negative_prompts, lora, lora_dir)
        _check_grammar("prompt", self.prompts)
        _check_grammar("negative_prompt", self.negative_prompts)
        self._painter = Engine(**given)
        self._painter.check([adapter for own in self._adapters for adapter in own])
        self._lock = threading.RLock()
        self._warned: set[str] = set()

    @property
    def model(self) -> str | os.PathLike | Model:
        """As it was given."""
        return self._painter.model

    @property
    def device(self) -> torch.device:
        return self._painter.device

    @property
    def dtype(self) -> torch.dtype:
        return self._painter.dtype

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
        clip_skip: int | None = None,
        emphasis: str = "original",
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
        vae_tiling: bool | str = "auto",
        latents: torch.Tensor | None = None,
        callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
        batch_size: int | None = None,
        **other: Any,
    ) -> Images:
        """Draw `num_images` pictures of each prompt, prompt by prompt; None leaves a setting to the model.

        guidance    cfg, apg, pag or cfg_zero; with guidance_rescale, guidance_interval=(from, to) in fractions of the
                    steps or guidance_sigma_interval, and the options of its kind (ldm.diffusion.guidance.Guidance)
        guidance_scale  one number, or a list with one for each picture; 1 and less: none, and half the work
        seed        image k of every prompt has seed + k; a list holds one for each picture; None or -1 draws one
        sampler     by our name or anybody's, "DPM++ 2M Karras" included (`ldm generate --help-samplers` lists them)
        timesteps   or sigmas: the noise levels themselves, descending, in place of a number of steps and a spacing
        eta         0 to 1, how much noise samplers that have this number add
        clip_skip   layers of CLIP that are left out at its end, counted as diffusers does (A1111's number less 1)
        emphasis    how (word:1.3) acts: original (the mean is restored, as in A1111) or no_norm
        strict      whether words that the model never saw, or brackets left open, are errors instead of warnings
        image       a picture or its file, or a list with one for each prompt, to begin at; its size is drawn
        mask_image  likewise, of the same size: white is painted, grey counts as what it is nearer to, and where it is
                    black the very pixels of the image stay; for every model, and needed by those with 9 channels
        strength    above 0 to 1: how much of the steps is run on an image (0.8, with outpaint 1)
        outpaint    {"left": 64, …}: how many pixels the image grows at left, right, top and bottom
        variation_seed, variation_strength  above 0 to 1: how far the first noise is mixed with that of another seed;
                    then every picture of a prompt has the same seed, and picture k has variation_seed + k
        hires_scale draw, make the picture so many times larger, and draw on for hires_strength (0.7) of hires_steps
                    (as many as before)
        vae_tiling  True, False or "auto": the VAE works in tiles (with auto above 1024x1024 pixels)
        latents     unit-variance starting noise (images, C, h, w) in place of the seeds'
        callback    called as (i, x, x0) after step i of each batch, x and x0 (B, C, h, w); where it returns True the
                    work ends, and the result holds the pictures that are finished
        batch_size  how many pictures are denoised together; their bits do not depend on it
        diffusers' and A1111's words are taken too (see ldm.pipeline.keywords.ALIASES).

        Raises ConfigError before any weight is read; ModelError; NumericsError where a picture is NaN in fp32 too;
        ResourceError out of memory. Whatever stops a call part-way carries the finished pictures as `.images`.
        """
        own = {**dict.fromkeys(GUIDANCE_WORDS), **{k: v for k, v in locals().items() if k in CALL}}
        given, painter = canonical(other, own, OWN), self._painter
        call = check_request(given, len(self.prompts), painter.info)
        with self._lock:
            model = painter.load()
            pictures = self._pictures(call)
            records = make_records(model, painter.work, call.settings, pictures)
            _tell(records, call.strict)
            self._tell_sizes(call, painter.info)
            return self._draw(call, pictures, records)

    def _pictures(self, call: Request) -> list[ImageRequest]:
        """One for each image of the call, prompt by prompt."""
        none, settings = (None,) * len(call.seeds), call.settings
        latents = none if call.latents is None else call.latents
        sources = none if call.sources is None else call.sources.fitted(settings.height, settings.width)
        prompts = [p for p in range(len(self.prompts)) for _ in range(call.num_images)]
        return [
            ImageRequest(self.prompts[p], self.negative_prompts[p], seed, scale, self._adapters[p], *own)
            for p, seed, scale, *own in zip(
                prompts, call.seeds, call.guidance_scales, latents, call.variations or none, sources
            )
        ]

    def _tell_sizes(self, call: Request, info: ModelInfo) -> None:
        """Say what is resized, and warn once of a size that the model was not trained on."""
        settings = call.settings
        for line in () if call.sources is None else call.sources.resized(settings.height, settings.width):
            console.say(line)
        line = too_large(info, settings)
        if line and line not in self._warned:
            self._warned.add(line)
            console.warn(line)

    def _draw(self, call: Request, pictures: list[ImageRequest], records: list[dict]) -> Images:
        """All pictures with their records; those that are finished, where the callback stops the work."""
        drawn: dict[int, Any] = {}

        def finished() -> Images:
            return Images([drawn[row] for row in sorted(drawn)], [records[row] for row in sorted(drawn)])

        steps = -(-len(pictures) // call.batch_size) * sum(
            run.steps for run in call.settings.runs
        )  # more where batches are parted
        try:
            with console.progress(total=steps, desc="drawing", unit="step") as bar:
                watch = _watching(call.callback, bar)
                for row, image, notes in self._painter.draw(call.settings, pictures, call.batch_size, watch):
                    drawn[row] = image
                    records[row] |= notes
        except Stopped:
            console.say(f"stopped by the callback, {len(drawn)} of {len(pictures)} pictures are finished", verbosity=1)
        except (LdmError, KeyboardInterrupt) as stop:
            stop.images = finished()
            raise
        return finished()

    def stream(self, **settings: Any) -> Iterator[Step]:
        """As generate, giving each step as it happens: `for step in pipe.stream(): step.preview`.

        A Step has .index, .rows (which pictures), .x0, .preview and .previews, small pictures of what is to come; the
        last step is given once more, with the finished pictures as .images. Leaving the loop stops the work. What
        generate raises is raised by the loop.
        """
        from ldm.pipeline.stream import stream

        callback = settings.pop("callback", None)
        return stream(
            lambda listener: self.generate(**settings, callback=listener), callback, lambda: self._painter.load().vae
        )

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the model as a diffusers folder in this pipeline's dtype, model card included, and return its path.

        The LoRAs of `lora` are merged into it, those of tags in prompts are not.
        """
        from ldm.checkpoint import card_of, save_model

        with self._lock:
            model = self._painter.adapted(self._painter.load(), self._everywhere)
            return save_model(model, folder, dtype=model.dtype, readme=card_of(model))


class Stopped(Exception):
    """The callback asked for the end of the work."""


def _watching(callback: Callable | None, bar: Any) -> Callable:
    """What is called after each step of a batch: the bar, then the user's callback."""

    def watch(rows, i, x, x0):
        bar.update()
        if isinstance(callback, Listener):
            ends = callback(rows, i, x, x0)
        else:
            ends = callback is not None and callback(i, x, x0)
        if ends is True:
            raise Stopped

    return watch


def _check_grammar(where: str, texts: Sequence[str | None]) -> None:
    """Raise ConfigError for weights, brackets and words in texts that cannot be drawn."""
    for i, text in enumerate(texts):
        check(text or "", where=f"{where}[{i}]" if len(texts) > 1 else where)


def _tell(records: Sequence[dict], strict: bool) -> None:
    """Warn of what the model does not see of the prompts; with `strict` raise ConfigError instead."""
    lines = warnings_of(records)
    if lines and strict:
        raise ConfigError(lines[0], where="prompt", todo="change the prompt, or leave strict out")
    for line in lines:
        console.warn(line)
