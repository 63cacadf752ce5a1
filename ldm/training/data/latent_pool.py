"""Latents and text tensors of some thousand samples in memory, which are replaced piece by piece during training.

What the pool holds at a step is a function of the settings and the step alone, so a resumed run refills it exactly.
N pool size   C, h, w latent channels, height, width   T shape of the text tensor
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.console import progress
from ldm.device import fast_bf16
from ldm.nn.vae import VAE
from ldm.training.data.samples import Samples, stream, to_float
from ldm.training.settings import PIECE


class LatentPool:
    """`latents` (N, C, h, w) fp32 and `texts` (N, T), in slots; `captions` beside them."""

    def __init__(
        self,
        samples: Samples,
        encode_images: Callable[[Tensor], Tensor],  # uint8 (B, H, W, 3) → (B, C, h, w)
        encode_texts: Callable[[list[str]], Tensor],  # B captions → (B, T)
        size: int,
        renew: int,  # steps between the replacement of one piece and the next; 0: never
        workers: int,
        first_step: int = 0,
    ):
        self.encode_images, self.encode_texts, self.renew = encode_images, encode_texts, renew
        self.pieces = size // PIECE
        self.next = first_step // renew if renew else 0  # number of the next piece to be made
        self._stream = stream(samples, self.next * PIECE, PIECE, workers if renew else 0)
        self.captions: list[str] = [""] * size
        self.latents = self.texts = None
        for _ in progress(range(self.pieces), desc="filling the pool", unit="piece"):
            self._fill()

    def _fill(self) -> None:
        images, captions = next(self._stream)
        latents, texts = self.encode_images(images), self.encode_texts(captions)
        if self.latents is None:
            self.latents = latents.new_empty((self.pieces * PIECE, *latents.shape[1:]))
            self.texts = texts.new_empty((self.pieces * PIECE, *texts.shape[1:]))
        place = self.next % self.pieces * PIECE
        self.latents[place : place + PIECE] = latents
        self.texts[place : place + PIECE] = texts
        self.captions[place : place + PIECE] = captions
        self.next += 1

    def at(self, step: int) -> LatentPool:
        """The pool as it has to be at `step`; steps are asked for in order."""
        while self.renew and self.next - self.pieces < step // self.renew:
            self._fill()
        return self


@torch.no_grad()
def encode_images(vae: VAE, images: Tensor, device: torch.device, chunk: int = 32) -> Tensor:
    """uint8 (B, H, W, 3) → scaled latents (B, C, h, w) fp32: the posterior's mean, in bf16 where that is faster."""
    with torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device)):
        return torch.cat([vae.encode(to_float(part, device)).float() for part in images.split(chunk)])
