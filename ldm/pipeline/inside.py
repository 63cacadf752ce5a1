"""A pipeline's model seen from inside: the denoiser that a sampler is given, and what cross-attention looks at.

Shapes:  B images   C latent channels   h, w latent size   n steps   W words of a prompt
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint import Model
from ldm.config import require
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.denoiser import sample as run_sampler
from ldm.diffusion.guidance.guided import guided_denoiser, zero_init
from ldm.diffusion.schedule import Schedule
from ldm.errors import ConfigError, nearest
from ldm.images import to_pil, to_tensor
from ldm.nn.attention_maps import averaged, recorded
from ldm.nn.lora import clone_shared_weights
from ldm.nn.text import ClipText, Conditioning, OpenClipText, TextEncoder, XLText
from ldm.nn.unet import UNet
from ldm.pipeline.encode import Condition, Encoder, PromptTokens, draw_noise, with_named_emoji
from ldm.pipeline.engine import Engine, decode, network_of
from ldm.pipeline.keywords import ALIASES, GUIDANCE_WORDS
from ldm.pipeline.request import ImageRequest, Settings
from ldm.prompts import BREAK, Text

OF_DENOISER: tuple[str, ...] = ("num_images", "seed", "num_inference_steps", "guidance_scale", "height", "width")
OF_DENOISER += ("sampler", "spacing", "timesteps", "sigmas", "eta", "clip_skip", "emphasis", "latents")
OF_DENOISER += ("true_cfg_scale", *GUIDANCE_WORDS)  # generate's keywords that say what a denoiser is


@dataclass(frozen=True)
class Denoiser:
    """A model under prompts and guidance, as a sampler sees it: denoiser(x (B, C, h, w), sigma) -> x0 (B, C, h, w).

    x is x0 + sigma * noise, on whichever scale the network itself was trained (see ldm.diffusion.schedule). B is the
    number of images that generate would draw.
    """

    model: Model
    settings: Settings
    requests: Sequence[ImageRequest]
    network: Callable[..., Tensor]
    conditions: tuple[Condition, Condition | None]  # with the prompts, with the negative ones

    @property
    def schedule(self) -> Schedule:
        return self.model.schedule

    @property
    def sigmas(self) -> Tensor:
        """(n + 1,) the noise levels that generate would visit, descending to 0."""
        return self.settings.runs[0].sigmas

    @property
    def start(self) -> Tensor:
        """(B, C, h, w) the images' first noise, of unit variance."""
        return draw_noise(self.model.vae, self.requests, self.settings.runs[0], self.model.device)[1]

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """x (B, C, h, w) at one sigma, or one for each image -> fp32, what the model takes them to be without noise.

        Raises ConfigError for sigmas that differ where something depends on the step: guidance in a part of the steps,
        the skipped steps of cfg_zero, prompts that change.
        """
        require(
            len(x) == len(self.requests), f"{len(x)} latents, and the denoiser has {len(self.requests)} images", "x"
        )
        levels = torch.as_tensor(sigma, dtype=torch.float32).cpu()
        require(
            levels.numel() in (1, len(x)),
            f"{levels.numel()} sigmas for {len(x)} images: give one, or one each",
            "sigma",
        )
        if levels.numel() > 1 and bool((levels != levels.view(-1)[0]).any()):
            self._check_stepless()
        return self._along(self.sigmas)(x.to(self.model.device), levels.expand(len(x)))

    def _check_stepless(self) -> None:
        """Raise ConfigError where the step that a sigma belongs to decides something for all images."""
        guidance = self.settings.guidance
        by_step = {
            "a guidance interval": guidance.interval or guidance.sigma_interval,
            "zero_init_steps": guidance.kind == "cfg_zero" and zero_init(guidance, self.schedule),
            "a prompt that changes from step to step": any(map(callable, self.conditions)),
        }
        for what, used in by_step.items():
            require(not used, f"the images' sigmas differ, and {what} needs one step for all: give one sigma", "sigma")

    def sample(
        self,
        sampler: str | None = None,
        sigmas: Tensor | None = None,
        callback: Callable[[int, Tensor, Tensor], Any] | None = None,
    ) -> Tensor:
        """The images' latents (B, C, h, w): those of generate, or by another of SAMPLERS over other noise levels.

        Each run begins at the same noise. Whether a sampler suits the model is not asked here: ddpm runs with a flow
        model too. `callback` is called as (i, x, x0) after step i.
        """
        s, levels = self.settings, self.sigmas if sigmas is None else sigmas
        noise, start = draw_noise(self.model.vae, self.requests, s.runs[0], self.model.device)
        run = (self._along(levels), self.schedule, levels, start, sampler or s.sampler)
        eta = s.eta if sampler in (None, s.sampler) else None
        return run_sampler(*run, noise=noise, spacing=s.spacing, eta=eta, callback=callback)

    def _along(self, sigmas: Tensor) -> Denoise:
        """The denoiser of a new run: APG's momentum begins with it, and its steps are counted along `sigmas`."""
        guidance = replace(self.settings.guidance, scale=tuple(request.cfg_scale for request in self.requests))
        return guided_denoiser(self.network, *self.conditions, guidance, self.schedule, sigmas, dtype=self.model.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents (any number, C, h, w) as images."""
        return to_pil(decode(self.model.vae, latents))

    @torch.no_grad()
    def encode(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Images of one size as latents (any number, C, h, w)."""
        return self.model.vae.encode(to_tensor(images))


def check_keywords(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a keyword of generate that a denoiser does not take."""
    for word, value in settings.items():
        if ALIASES.get(word, word) not in OF_DENOISER and value is not None:
            raise ConfigError(f"unknown setting {word!r} of a denoiser", hint=nearest(word, OF_DENOISER))


@torch.no_grad()  # also for what a U-Net prepares of its weights: with gradients it would compute in another way
def make_denoiser(engine: Engine, settings: Settings, requests: Sequence[ImageRequest]) -> Denoiser:
    """For images without an original. Raises ConfigError for images of several LoRAs or chunks, and with offload."""
    require(not engine.placement.offload, "its network stays on the device: leave it out", "offload")
    (run,), loras = settings.runs, {request.adapters for request in requests}
    require(len(loras) == 1, "prompts of one denoiser have the same LoRAs", "prompt")
    model = engine.adapted(engine.load(), requests[0].adapters)
    tokens = PromptTokens()
    chunks = {tokens.chunks(model.text, request.prompts, run.steps) for request in requests}
    require(len(chunks) == 1, "prompts of one denoiser have as many chunks of tokens", "prompt")
    encoder = Encoder(model.text, tokens, engine.placement, model.dtype)
    found = encoder.conditions(requests, run.steps, settings.clip_skip, settings.emphasis)
    return Denoiser(model, settings, requests, network_of(model.unet, run, requests), found)


@dataclass(frozen=True)
class AttentionMaps:
    """How much each place of an image looked at each word of its prompt, step by step."""

    image: Image.Image  # the one that generate draws
    words: tuple[str, ...]
    steps: Tensor  # (n, W, h, w) in [0, 1]: the mean over layers and heads, added up over a word's tokens

    def __getitem__(self, word: str) -> Tensor:
        """(h, w) of a word, the mean over the steps; a word that stands there twice is added up. Raises ConfigError."""
        rows = [row for row, one in enumerate(self.words) if one.lower() == word.lower()]
        if not rows:
            raise ConfigError(f"the prompt has no word {word!r:.80}", hint=nearest(word, self.words))
        return self.steps[:, rows].sum(1).mean(0)

    def overlay(self, word: str) -> Image.Image:
        """The image, dark where the word was looked at least and as it is where it was looked at most."""
        found = self[word]
        found = (found - found.min()) / (found.max() - found.min()).clamp(min=1e-6)
        (light,) = to_pil((2 * found - 1).expand(1, 3, *found.shape))
        light = light.convert("L").resize(self.image.size, Image.Resampling.BICUBIC)
        return Image.composite(self.image, self.image.point(lambda level: level // 6), light)


@torch.no_grad()
def attention_maps(denoiser: Denoiser) -> AttentionMaps:
    """Draw the one image of a denoiser and record what its cross-attention looks at.

    Raises ConfigError for several images, prompts that change from step to step, and models without a U-Net and CLIP.
    """
    model, cond = denoiser.model, denoiser.conditions[0]
    require(len(denoiser.requests) == 1, "attention maps are of one image", "num_images")
    if not isinstance(cond, Conditioning):
        raise ConfigError("the words change from step to step", where="prompt")
    if not isinstance(model.unet, UNet):
        raise ConfigError("attention maps need a U-Net", where="model")
    words = words_of(model.text, denoiser.requests[0].prompt.at_steps(1)[0][1])
    unet, steps = clone_shared_weights(model.unet), []  # hooks of its own: others may be drawing with the shared one
    inner, row = network_of(unet, denoiser.settings.runs[0], denoiser.requests), 0

    def network(x: Tensor, timesteps: Tensor, *, states: Tensor, **more: Any) -> Tensor:
        nonlocal row  # of those that guidance asks for, the one with the prompt
        row = next(i for i, one in enumerate(states) if torch.equal(one, cond.states[0]))
        return inner(x, timesteps, states=states, **more)

    with recorded(unet) as layers:

        def after(i: int, x: Tensor, x0: Tensor) -> None:
            tokens = averaged(layers, row, *x.shape[-2:])  # (S, h, w)
            steps.append(torch.stack([tokens[places].sum(0) for _, places in words]).cpu())

        latents = replace(denoiser, network=network).sample(callback=after)
    return AttentionMaps(denoiser.decode(latents)[0], tuple(word for word, _ in words), torch.stack(steps))


def words_of(encoder: TextEncoder, text: Text) -> list[tuple[str, list[int]]]:
    """(word or sign, the places of its tokens among the states) of a prompt, in order. Raises ConfigError for T5."""
    part = encoder.first if isinstance(encoder, XLText) else encoder
    if not isinstance(part, ClipText | OpenClipText):
        raise ConfigError("words are told apart by CLIP's tokens, and this model reads with T5", where="model")
    text = with_named_emoji(encoder, text)
    (chunks, *_) = PromptTokens().of(encoder, text).parts
    places = [c * part.max_length + 1 + i for c, chunk in enumerate(chunks) for i in range(len(chunk))]
    words = [word for piece in text.pieces if piece is not BREAK for word in re.findall(r"\w+|[^\w\s]", piece.text)]
    counts = [len(part.token_ids(word)) for word in words]
    require(sum(counts) == len(places), "its words cannot be told apart by their tokens", "prompt")
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [(word, places[end - count : end]) for word, count, end in zip(words, counts, ends)]
