"""What a batch starts from: the texts' states, each text encoded once, and noise, each image from its own generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ldm.nn.text import Conditioning
    from ldm.pipeline.work import Work

KEPT = 256  # distinct texts whose states stay in memory during one call


class Encoder:
    """Encodes texts alone and once each: (B texts) -> Conditioning with states (B, S, D) where the U-Net works."""

    def __init__(self, text: Any, work: Work, dtype: torch.dtype):
        self._text, self._work, self._dtype = text, work, dtype
        self._known: dict[str | None, Conditioning] = {}

    def __call__(self, texts: Sequence[str | None]) -> Conditioning:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            with self._work.on(self._text) as encoder:
                self._known |= {text: encoder.encode([text]).to(self._work.device, self._dtype) for text in new}
        rows = [self._known[text] for text in texts]
        for text in list(self._known)[:-KEPT]:
            del self._known[text]
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
