"""Latents and text embeddings for batches: from memory, from the cache, or encoded when they are needed.

Shapes:  B images or texts   C, h, w latent channels, height, width   H, W image size
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.data.transforms import View
from ldm.device import free_memory
from ldm.errors import NumericsError
from ldm.nn.text import TextEncoder
from ldm.nn.vae import VAE

Embedding = tuple[Tensor | None, ...]  # a caption's states (1, S, D), pooled (1, P) and mask (1, S)
EMBEDDED = ("states", "pooled", "mask")
MEMORY = 2 << 30  # bytes of entries that are kept in memory at most, and at most a quarter of the free memory


class Row(NamedTuple):
    """A sample of a batch."""

    id: str  # for messages
    latents: Tensor  # (C, h, w) fp32, drawn from their distribution; or pixels, uint8 (3, H, W)
    caption: str
    time_ids: tuple[int, ...]  # original size, crop, target size
    mask: Tensor | None = None  # (1, h, w) in [0, 1], of what is learned
    control: Tensor | None = None  # uint8 (3 or 1, H, W): what a ControlNet sees


def nothing(place: int, view: View) -> None:
    """What stands for masks and conditions where the settings ask for none."""


class Encoders:
    """The autoencoder and the text encoder in their own precision, also inside of autocast.

    `text` is None where captions are not embedded. `ids` are digests of their weights, which name the entries of a
    cache.
    """

    def __init__(self, vae: VAE, text: TextEncoder | None, ids: tuple[str, str], device: torch.device):
        self.vae, self.text, self.device = vae.to(device), text.to(device) if text is not None else None, device
        self.ids = ids
        self.vae_id = f"{ids[0]} {vae.dtype} {vae.scaling_factor} {vae.shift_factor}"
        self.text_id = f"{ids[1]} {text.dtype} {getattr(text, 'zero_empty', '')}" if text is not None else "none"

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and std of the scaled latents, fp32 (B, C, h, w) on the CPU.

        Where 16 bits overflow they are encoded in fp32. Raises NumericsError where that is not finite either.
        """
        vae, kind = self.vae, self.vae.dtype
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            try:
                mean, std = vae.moments(images)
            except NumericsError:
                if kind == torch.float32:
                    raise
                try:
                    mean, std = vae.to(torch.float32).moments(images)
                finally:
                    vae.to(kind)
        return mean.cpu(), std.cpu()

    def embed(self, texts: list[str], together: bool = False) -> dict[str, Tensor]:
        """States, pooled and mask of texts, those that the encoder has, on the CPU; "" is embedded as None.

        One by one, so that the bits of each are always the same; or `together`, which is faster, and takes no "".
        """
        assert self.text is not None
        together = together and hasattr(self.text, "encode_together")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            encode = self.text.encode_together if together else self.text.encode
            cond = encode([text or None for text in texts])
        named = {"states": cond.states, "pooled": cond.pooled, "mask": cond.mask}
        return {name: tensor.cpu() for name, tensor in named.items() if tensor is not None}


def embed_rows(encoders: Encoders, texts: Sequence[str]) -> dict[str, Embedding]:
    """Text -> its states (1, S, D), pooled (1, P) and mask (1, S), all embedded together; of "" none."""
    texts = list(dict.fromkeys(filter(None, texts)))
    if not texts:
        return {}
    tensors = encoders.embed(texts, together=True)
    parts = [tensors.get(name) for name in EMBEDDED]
    return {text: tuple(None if p is None else p[i : i + 1] for p in parts) for i, text in enumerate(texts)}


class Memory:
    """Tensors that are kept until the memory is full; none is removed, for an epoch needs each exactly once."""

    def __init__(self, limit: int = MEMORY):
        self.room = min(limit, free_memory(torch.device("cpu")) // 4)
        self._kept: dict[Hashable, tuple[Tensor | None, ...]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def get(self, key: Hashable, make: Callable[[], tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
        tensors = self._kept.get(key)
        if tensors is None:
            tensors = make()
            size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
            if size <= self.room:
                self._kept[key] = tensors
                self.room -= size
        return tensors
