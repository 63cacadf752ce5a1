"""What a batch starts from: the texts' states, each text encoded once, and noise, each image from its own generator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ldm.nn.text import Conditioning

KEPT = 256  # distinct texts whose states stay in memory during one call


class Encoder:
    """Encodes texts alone and once each: (B texts) -> Conditioning with states (B, S, D) on the U-Net's device."""

    def __init__(self, text: Any, device: torch.device, dtype: torch.dtype):
        self._one = lru_cache(KEPT)(lambda prompt: text.encode([prompt]).to(device, dtype))

    def __call__(self, texts: Sequence[str | None]) -> Conditioning:
        rows = [self._one(text) for text in texts]
        return type(rows[0]).cat(rows)


class Noise:
    """Standard normal noise (B, C, h, w), drawn per image from a CPU generator, so that an image's is always the same.

    Each call is the next draw of every image: the first is the starting noise, the following are for the sampler.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device):
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._shape, self._device = shape, device

    def __call__(self, i: int = 0) -> torch.Tensor:
        return torch.stack([torch.randn(self._shape, generator=g) for g in self._generators]).to(self._device)
