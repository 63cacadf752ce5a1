"""What a batch starts from: the texts' states, each text encoded once, and noise, each image from its own generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ldm.nn.text import count_chunks, encode_weighted
from ldm.prompts import at_steps

if TYPE_CHECKING:
    from ldm.nn.text import Conditioning
    from ldm.pipeline.placement import Placement

KEPT = 256  # distinct texts whose states stay in memory


class Encoder:
    """Encodes texts alone and once each: (B texts) -> Conditioning with states (B, S, D) where the U-Net works."""

    def __init__(self, text: Any, work: Placement, dtype: torch.dtype, clip_skip: int = 0, emphasis: str = "original"):
        self.text, self.clip_skip, self.emphasis = text, clip_skip, emphasis
        self._work, self._dtype = work, dtype
        self._known: dict[tuple[str | None, int], Conditioning] = {}

    def __call__(self, texts: Sequence[str | None], chunks: int = 1) -> Conditioning:
        """Each text in at least so many chunks (see `chunks_needed`)."""
        new = [text for text in dict.fromkeys(texts) if (text, chunks) not in self._known]
        if new:
            with self._work.on(self.text) as encoder:
                for text in new:
                    cond = encode_weighted(encoder, [text], self.clip_skip, self.emphasis, chunks)
                    self._known[text, chunks] = cond.to(self._work.device, self._dtype)
        for text in dict.fromkeys(texts):  # those used last stand last
            self._known[text, chunks] = self._known.pop((text, chunks))
        rows = [self._known[text, chunks] for text in texts]
        for key in list(self._known)[:-KEPT]:
            del self._known[key]
        return type(rows[0]).cat(rows)

    def over(
        self, texts: Sequence[str | None], steps: int, chunks: int
    ) -> Conditioning | Callable[[int], Conditioning]:
        """The texts' states; where prompt editing changes one on the way, a function of the step (from 0)."""
        plans = [text_at_steps(text, steps) for text in texts]
        if all(len(plan) == 1 for plan in plans):
            return self([plan[0][1] for plan in plans], chunks)
        rows = [tuple([text for first, text in plan if first <= step][-1] for plan in plans) for step in range(steps)]
        known = {row: self(row, chunks) for row in dict.fromkeys(rows)}
        return lambda step: known[rows[step]]


def chunks_needed(encoder: Any, texts: Sequence[str | None], steps: int) -> int:
    """How many chunks of tokens the longest of these texts is for a text encoder, at any step."""
    said = {own for text in dict.fromkeys(texts) for _, own in text_at_steps(text, steps)}
    return max(count_chunks(encoder, text) for text in said)


def text_at_steps(text: str | None, steps: int) -> list[tuple[int, str | None]]:
    """As `at_steps`; None, which stands for no text at all, stays."""
    return [(0, None)] if text is None else at_steps(text, steps)


class Noise:
    """Standard normal noise (B, C, h, w), drawn per image from a CPU generator, so that an image's is always the same.

    Each call is the next draw of every image: the first is the starting noise, the following are for the sampler.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device):
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._shape, self._device = shape, device

    def __call__(self, i: int = 0) -> torch.Tensor:
        return torch.stack([torch.randn(self._shape, generator=g) for g in self._generators]).to(self._device)
