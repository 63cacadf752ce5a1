"""Pipeline: prompts and a model, checked; generate: pictures from them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import console
from ldm.errors import ConfigError, LdmError, ModelError, NumericsError, ResourceError
from ldm.images import to_pil
from ldm.pipeline.adapters import take_adapters
from ldm.pipeline.record import dtype_name, make_records, warnings_of
from ldm.pipeline.result import Images
from ldm.pipeline.settings import (
    GUIDANCE_WORDS,
    Settings,
    canonical,
    check_negative,
    check_prompts,
    check_settings,
    check_steps,
)

if TYPE_CHECKING:
    import torch

    from ldm.checkpoint import Model
    from ldm.nn.unet import UNet
    from ldm.nn.vae import VAE
    from ldm.pipeline.encoding import Encoder

OWN = ("prompt", "model", "negative_prompt", "lora", "lora_dir", "allow_unapplied", "vae", "prediction_type")
OWN += ("device", "dtype", "offload", "attention")
CALL = ("num_images", "seed", "num_inference_steps", "guidance_scale", "height", "width", "sampler", "spacing")
CALL += ("eta", "latents", "callback", "batch_size", *GUIDANCE_WORDS)


class Pipeline:
    """Draws pictures of `prompt`, a text or a list of texts.

    prompt           what to draw; up to 100,000 characters each
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
    diffusers' and A1111's words for these are taken too (see ldm.pipeline.settings.ALIASES).

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
        from ldm.pipeline.work import Work

        prompts = check_prompts(prompt)
        self.negative_prompts = check_negative(given["negative_prompt"], len(prompts))
        self.prompts, self._adapters = take_adapters(prompts, self.negative_prompts, lora, lora_dir, allow_unapplied)
        self.model = given["model"]
        self.vae = given["vae"]
        self.device, self.dtype = _place(self.model, given["device"], given["dtype"], given["offload"])
        self._work = Work(self.device, given["offload"], given["attention"])
        self.prediction_type = given["prediction_type"]
        self._folder = _check_model(self.model, self.vae, self.prediction_type)
        self._adapters.check(self.model, self.prediction_type)
        self._lock = threading.RLock()

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
        eta: float | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float = 0.8,
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
        eta         0 to 1, how much noise samplers that have this number add
        latents     unit-variance starting noise (images, C, h, w) in place of the seeds'
        callback    called as (i, x, x0) after step i of each batch, x and x0 (B, C, h, w)
        batch_size  how many pictures are denoised together; their bits do not depend on it
        diffusers' and A1111's words are taken too (see ldm.pipeline.settings.ALIASES).

        Raises ConfigError before any weight is read; ModelError; NumericsError where a picture is NaN in fp32 too;
        ResourceError out of memory. Whatever stops a call part-way carries the finished pictures as `.images`.
        """
        own = {**dict.fromkeys(GUIDANCE_WORDS), **{k: v for k, v in locals().items() if k in CALL}}
        refused = {"image": image, "mask_image": mask_image, "strength": strength}
        asked = check_settings(canonical({**refused, **other}, own, OWN), len(self.prompts), self.vae or self._folder)
        check_steps(asked, self._folder)
        with self._lock:
            model = self._load()
            settings = asked.resolve(model)
            records = make_records(model, self._work, settings, self.prompts, self.negative_prompts)
            for line in warnings_of(records):
                console.warn(line)
            return Images(self._draw_all(model, settings, records), records)

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the model as a diffusers folder in this pipeline's dtype, model card included, and return its path.

        The LoRAs of `lora` are merged into it, those of tags in prompts are not.
        """
        from ldm.checkpoint import card_of, save_model

        with self._lock:
            model = self._adapters.model(self._load(), self._adapters.everywhere)
            return save_model(model, folder, dtype=model.dtype, readme=card_of(model))

    def _load(self, dtype: torch.dtype | None = None) -> Model:
        from ldm.checkpoint import load_model

        if not isinstance(self.model, (str, os.PathLike)):
            return self.model
        asked = {"vae": self.vae, "prediction_type": self.prediction_type}
        return load_model(self.model, device=self._work.home, dtype=dtype or self.dtype, **asked)

    def _draw_all(self, model: Model, settings: Settings, records: list[dict]) -> list:
        """All pictures, batch by batch. A picture that is NaN is drawn again in fp32, alone, and its record says so."""
        import torch

        if self.device.type == "cuda" and model.dtype == torch.float32:
            torch.backends.cudnn.allow_tf32 = False  # fp32 is what was asked for
        drawn, adapted = [], None
        batches = self._batches(settings)
        total = len(batches) * settings.num_inference_steps
        try:
            with console.progress(total=total, desc="drawing", unit="step") as bar:
                for rows in batches:
                    before, adapted = adapted, self._adapted(model, settings, rows[0])
                    if adapted is not before:
                        encode = self._encoder(adapted)
                    for row in rows:
                        records[row] |= {key: value for key, value in adapted.info.items() if key == "lora"}
                    images = self._draw(adapted, encode, settings, rows, bar.update)
                    for row, image in zip(rows, images):
                        if not torch.isfinite(image).all():
                            image = self._draw_in_fp32(settings, records[row], row)
                        drawn += to_pil(image[None])
        except (LdmError, KeyboardInterrupt) as stop:
            stop.images = Images(drawn, records[: len(drawn)])
            raise
        return drawn

    def _batches(self, settings: Settings) -> list[list[int]]:
        """The rows that are drawn together: at most batch_size, under the same LoRAs."""
        batches, size = [], settings.batch_size
        for _, group in groupby(range(len(settings.seeds)), lambda row: self._adapters.of(row // settings.num_images)):
            rows = list(group)
            batches += [rows[i : i + size] for i in range(0, len(rows), size)]
        return batches

    def _adapted(self, model: Model, settings: Settings, row: int) -> Model:
        """The model with the LoRAs that picture `row` is drawn with."""
        return self._adapters.model(self._work.model(model), self._adapters.of(row // settings.num_images))

    def _draw(self, model: Model, encode: Encoder, settings: Settings, rows: Sequence[int], advance) -> torch.Tensor:
        """One batch, from texts and seeds to pictures (B, 3, H, W) in [-1, 1] on the CPU."""
        with out_of_memory(settings, len(rows)):
            prompts = [row // settings.num_images for row in rows]
            cond = encode([self.prompts[p] for p in prompts])
            uncond = encode([self.negative_prompts[p] for p in prompts])
            noise, start = starting_noise(model.vae, self.device, settings, rows)
            settings = replace(settings, guidance=settings.guidance.of(rows))
            latents = self._denoise(model, cond, uncond, settings, noise, start, advance)
            with self._work.on(model.vae) as vae:
                return decode(vae, latents)

    def _denoise(self, model: Model, cond, uncond, settings: Settings, noise, start, advance) -> torch.Tensor:
        """From the first noise to latents (B, C, h, w); what the U-Net was lent ends with this call."""
        from ldm.diffusion.guidance import guide
        from ldm.diffusion.sampling import sample

        s, schedule, dtype = settings, model.schedule, cond.states.dtype
        with self._work.on(model.unet) as unet:
            sigmas = schedule.sigmas(s.num_inference_steps, s.sampler, s.spacing)
            predict = guide(network(unet, s), cond, uncond, s.guidance, schedule, sigmas)
            after = each_step(s.callback, advance)
            own = {"spacing": s.spacing, "eta": s.eta, "dtype": dtype, "callback": after}
            return sample(predict, schedule, sigmas, start, s.sampler, noise=noise, **own)

    def _draw_in_fp32(self, settings: Settings, record: dict, row: int) -> torch.Tensor:
        """Picture `row` (3, H, W) once more; raises NumericsError where fp32 is what was tried or does not help."""
        import torch

        if self.dtype != torch.float32 and isinstance(self.model, (str, os.PathLike)):
            console.warn(f"seed {record['seed']}: NaN in {dtype_name(self.dtype)}, drawing it again in fp32")
            model = self._adapted(self._load(torch.float32), settings, row)
            (image,) = self._draw(model, self._encoder(model), settings, [row], lambda steps: None)
            record["dtype"] = "fp32"
            if torch.isfinite(image).all():
                return image
        what = f"the picture of {record['prompt'][:60]!r}, seed {record['seed']}, holds NaN or infinity"
        todo = "check the model's weights" if record["dtype"] == "fp32" else "use dtype fp32"
        raise NumericsError(what, todo=todo)

    def _encoder(self, model: Model) -> Encoder:
        from ldm.pipeline.encoding import Encoder

        return Encoder(model.text, self._work, model.dtype)


def network(unet: UNet, settings: Settings) -> Callable:
    """The U-Net as predict(x, timesteps, cond); XL's is told of a picture that was this large and is not cropped."""
    h, w = settings.height, settings.width
    sizes = (h, w, 0, 0, h, w) if unet.config.addition_embed_type == "text_time" else None  # original, crop, target

    def predict(x, timesteps, cond, **perturbed):
        time_ids = None if sizes is None else timesteps.new_tensor([sizes] * len(x))
        return unet(x, timesteps, cond.states, mask=cond.mask, pooled=cond.pooled, time_ids=time_ids, **perturbed)

    return predict


def starting_noise(
    vae: VAE, device: torch.device, settings: Settings, rows: Sequence[int]
) -> tuple[Callable, torch.Tensor]:
    """(the sampler's noise, the first noise (B, C, h, w)), from the seeds of `rows` or from the given latents."""
    from ldm.pipeline.encoding import Noise

    shape = (vae.latent_channels, settings.height // vae.factor, settings.width // vae.factor)
    noise = Noise([settings.seeds[row] for row in rows], shape, device)
    given = settings.latents
    return noise, noise() if given is None else given[list(rows)].to(device).float()


def each_step(callback: Callable | None, advance: Callable[[int], Any]) -> Callable:
    """What the sampler calls after a step: the user's callback, then the bar."""

    def after(i, x, x0):
        if callback:
            callback(i, x, x0)
        advance(1)

    return after


def decode(vae: VAE, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) -> pictures (B, 3, H, W) on the CPU; a picture that is not finite becomes NaN as a whole."""
    import torch

    images = []
    for one in latents.split(1):
        try:
            with torch.no_grad():
                images.append(vae.decode(one).float().cpu())
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
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    todo = f"use a smaller batch_size than {batch}" if batch > 1 else "use a smaller size or a smaller dtype"
    raise ResourceError(f"out of memory at {batch} x {settings.width}x{settings.height}", todo=todo)


def _place(model: Any, device: Any, dtype: Any, offload: bool) -> tuple[torch.device, torch.dtype]:
    """The device and dtype to use; those of a model that is loaded already (its dtype alone where parts are lent)."""
    from ldm.checkpoint import Model
    from ldm.device import pick_device, pick_dtype

    device, dtype = str(device), dtype_name(dtype)  # torch's own objects are taken too
    picked = pick_device(device)
    wanted = pick_dtype(dtype, picked)
    if isinstance(model, (str, os.PathLike)):
        return picked, wanted
    if not isinstance(model, Model):
        raise ConfigError(f"expected a name, a path or a loaded model, got {type(model).__name__}", where="model")
    if device != "auto" and model.device.type != picked.type and not offload:
        raise ConfigError(f"the given model is on {model.device}, not {picked}", where="device")
    if dtype != "auto" and model.dtype != wanted:
        raise ConfigError(f"the given model is loaded in {dtype_name(model.dtype)}", where="dtype")
    return picked if offload else model.device, model.dtype


def _check_model(model: Any, vae: Any, prediction_type: str | None) -> Path | None:
    """The model's folder or file, looked at but not loaded; None for a loaded model that came from none."""
    from ldm.checkpoint import check_model

    if vae is not None and not isinstance(vae, (str, os.PathLike)):
        raise ConfigError(f"expected a folder or a file, got {type(vae).__name__}", where="vae")
    if vae is not None and not isinstance(model, (str, os.PathLike)):
        raise ConfigError("a loaded model has its VAE already", where="vae")
    if vae is not None and not Path(vae).exists():
        raise ModelError("no such VAE", where=vae)
    if prediction_type is not None and not isinstance(model, (str, os.PathLike)):
        raise ConfigError("a loaded model has its schedule already", where="prediction_type")
    return check_model(model, vae, prediction_type)
