"""What a batch is drawn from: the prompts' states, each text encoded once, and noise, each image from its own seed.

Shapes:  B batch   C latent channels   h, w latent size   S text tokens   D width of the states
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from ldm.data.emoji.names import with_names
from ldm.device import sent
from ldm.diffusion.inpaint import slerp
from ldm.nn.text import Conditioning, TextEncoder, Tokens, check_plain, encode_weighted, tokenize
from ldm.nn.vae import VAE
from ldm.pipeline.placement import Placement
from ldm.pipeline.request import ImageRequest, Run, Settings
from ldm.prompts import BREAK, Prompt, Text

KEPT = 256  # distinct texts whose states stay in memory
KEPT_TOKENS = 4096  # distinct texts whose tokens do

Condition = Conditioning | Callable[[int], Conditioning]


class PromptTokens:
    """The tokens of texts for one tokenizer, each text read once."""

    def __init__(self) -> None:
        self._known: dict[Text | None, Tokens] = {}

    def of(self, encoder: TextEncoder, text: Text | None) -> Tokens:
        if text is not None and not text.written.isascii():
            text = with_named_emoji(encoder, text)
        if text not in self._known:
            if len(self._known) == KEPT_TOKENS:
                self._known.clear()
            self._known[text] = tokenize(encoder, None if text is None else text.pieces)
        return self._known[text]

    def chunks(self, encoder: TextEncoder, prompts: Iterable[Prompt | None], steps: int) -> int:
        """How many chunks of tokens the longest of these prompts has at any step."""
        texts = {text for prompt in dict.fromkeys(prompts) for _, text in texts_at_steps(prompt, steps)}
        return max(self.of(encoder, text).chunks for text in texts)


def with_named_emoji(encoder: TextEncoder, text: Text) -> Text:
    """The text with the names of emoji, for an encoder that was trained on few words and not on these emoji."""
    return named_emoji(encoder, text)[0]


def named_emoji(encoder: TextEncoder, text: Text, trained: Iterable[str] = ()) -> tuple[Text, dict[str, str]]:
    """(the text as `with_named_emoji`, emoji -> the name that stands for it); LoRAs were trained on words too."""
    known = getattr(encoder, "words", None)
    if known is None:  # CLIP's own vocabulary has tokens for emoji
        return text, {}
    known = known.union(trained)
    written, named = with_names(text.written, known)
    if not named:
        return text, {}
    pieces = [
        piece if piece is BREAK else piece._replace(text=with_names(piece.text, known)[0]) for piece in text.pieces
    ]
    return Text(written, tuple(pieces)), named


def texts_at_steps(prompt: Prompt | None, steps: int) -> Sequence[tuple[int, Text | None]]:
    """(first step, text); None, which stands for no text at all, stays."""
    return [(0, None)] if prompt is None else prompt.at_steps(steps)


class Encoder:
    """Encodes texts alone and once each, where the text encoder works, for where the U-Net works."""

    def __init__(self, text: TextEncoder, tokens: PromptTokens, placement: Placement, dtype: torch.dtype):
        self.text, self._tokens, self._placement, self._dtype = text, tokens, placement, dtype
        self._known: dict[tuple[Text | None, int, int, str], Conditioning] = {}

    def conditions(
        self, requests: Sequence[ImageRequest], steps: int, clip_skip: int, emphasis: str
    ) -> tuple[Condition, Condition | None]:
        """(with the prompts, with the negative ones or None) of a batch; functions of the step where a text changes."""
        prompts, negatives = zip(*(request.prompts for request in requests))
        chunks = self._tokens.chunks(self.text, requests[0].prompts, steps)
        cond = self._over(prompts, steps, (chunks, clip_skip, emphasis))
        guided = any(request.cfg_scale > 1 for request in requests)
        return cond, self._over(negatives, steps, (chunks, clip_skip, emphasis)) if guided else None

    def _over(self, prompts: Sequence[Prompt | None], steps: int, settings: tuple[int, int, str]) -> Condition:
        plans = [texts_at_steps(prompt, steps) for prompt in prompts]
        if all(len(plan) == 1 for plan in plans):
            return self._encode([plan[0][1] for plan in plans], settings)
        return self._edited(plans, steps, settings)

    def _edited(
        self, plans: Sequence[Sequence[tuple[int, Text | None]]], steps: int, settings: tuple[int, int, str]
    ) -> Condition:
        rows = [tuple([text for first, text in plan if first <= step][-1] for plan in plans) for step in range(steps)]
        known = {row: self._encode(row, settings) for row in dict.fromkeys(rows)}
        return lambda step: known[rows[step]]

    def _encode(self, texts: Sequence[Text | None], settings: tuple[int, int, str]) -> Conditioning:
        chunks, clip_skip, emphasis = settings
        if new := [text for text in dict.fromkeys(texts) if (text, *settings) not in self._known]:
            with self._placement.on(self.text) as encoder:
                for text in new:
                    cond = encode_weighted(encoder, [self._tokens.of(self.text, text)], clip_skip, emphasis, chunks)
                    self._known[text, *settings] = cond.to(self._placement.device, self._dtype)
        for text in dict.fromkeys(texts):  # those used last stand last
            self._known[text, *settings] = self._known.pop((text, *settings))
        rows = [self._known[text, *settings] for text in texts]
        for key in list(self._known)[:-KEPT]:
            del self._known[key]
        return Conditioning.cat(rows)


class Noise:
    """Standard normal noise (B, C, h, w), drawn per image from a CPU generator, so that an image's is always the same.

    Each call is the next draw of every image: the first is the starting noise, the following are for the sampler.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device):
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._shape, self._device = shape, device

    def __call__(self, i: int = 0) -> torch.Tensor:
        return sent(torch.stack([torch.randn(self._shape, generator=g) for g in self._generators]), self._device)


def draw_noise(
    vae: VAE, requests: Sequence[ImageRequest], run: Run, device: torch.device
) -> tuple[Noise, torch.Tensor]:
    """(the sampler's noise, the first noise (B, C, h, w)) from the images' seeds, latents and variations."""
    shape = (vae.latent_channels, run.height // vae.factor, run.width // vae.factor)
    noise = Noise([request.seed for request in requests], shape, device)
    given = [request.latents for request in requests if request.latents is not None]  # of all or of none
    start = torch.stack(given).cpu().float() if given else noise().cpu()
    variations = [request.variation for request in requests]
    varied = [one if v is None else _varied(one, *v) for one, v in zip(start, variations, strict=True)]
    return noise, sent(torch.stack(varied), device)


def _varied(noise: torch.Tensor, seed: int, strength: float) -> torch.Tensor:
    """The first noise (C, h, w), mixed with that of the variation's seed."""
    return slerp(noise, torch.randn(noise.shape, generator=torch.Generator("cpu").manual_seed(seed)), strength)


def check_plain_prompts(requests: Sequence[ImageRequest], settings: Settings) -> None:
    """Raise ConfigError for emphasis in prompts, which a model that reads with T5 does not take."""
    for prompt in dict.fromkeys(prompt for request in requests for prompt in request.prompts if prompt is not None):
        for run in settings.runs:
            for _, text in prompt.at_steps(run.steps):
                check_plain(text.pieces)
