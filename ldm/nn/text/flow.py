"""The text encoders of SD3 (CLIP-L, OpenCLIP-G, T5) and FLUX (CLIP-L, T5) as one (Esser et al. 2024, appendix B).

Shapes:  B texts   S tokens   D width of the states   P width of the pooled text
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import ModelError
from ldm.nn.text.clip import ClipText
from ldm.nn.text.conditioning import Conditioning, InChunks, SeveralNetworks, Side, Tokens, one_by_one

if TYPE_CHECKING:
    from ldm.nn.text.t5 import T5Text

SD3_TOKENS, DEV_TOKENS, SCHNELL_TOKENS = 256, 512, 256  # that T5 reads, in SD3 and both kinds of FLUX.1


class FlowText(SeveralNetworks, InChunks):
    """States (B, S, D) and pooled text (B, P) for a flow transformer; there is no mask, as these models were trained.

    SD3, with two encoders of CLIP: their states of the last layer but one side by side, with zeros up to D, and T5's
    behind them (zeros where T5 is left out); pooled is the projected text of both. FLUX, with one: T5's states, and
    CLIP's pooled text. T5 reads `tokens` tokens, padding included. Raises ModelError for encoders that do not fit.
    """

    def __init__(self, first: ClipText, second: ClipText | None, t5: T5Text | None, width: int, tokens: int):
        self.first, self.second, self.t5, self.width = first, second, t5, width
        self.tokens = tokens if t5 is None else min(tokens, t5.max_length)
        self.max_length: int = first.max_length
        self.is_flux = second is None
        self.reads_t5 = t5 is not None
        self.left_out_always, self.most_chunks = (0, 1) if self.is_flux else (1, None)
        if t5 is None and self.is_flux:
            raise ModelError("FLUX reads with T5, and there is none")
        if t5 is not None and t5.width != width:
            raise ModelError(f"T5's states are {t5.width} wide, and {width} are needed")
        if not self.is_flux and not all(clip.projects for clip in self.clips):
            raise ModelError("both of SD3's CLIP encoders have to project their pooled text")
        if not self.is_flux and (self.clips[0].max_length != self.clips[1].max_length or sum(self._widths) > width):
            raise ModelError(f"CLIP's states of widths {self._widths} do not fit together in {width}")

    @property
    def clips(self) -> tuple[ClipText, ...]:
        """CLIP's encoders."""
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def _widths(self) -> tuple[int, ...]:
        return tuple(clip.width for clip in self.clips)

    @property
    def encoders(self) -> tuple[ClipText | T5Text, ...]:
        """CLIP's, then T5 where it is there."""
        return self.clips if self.t5 is None else (*self.clips, self.t5)

    @property
    def clip_layers(self) -> tuple[int, ...]:
        """How many layers each of SD3's CLIP encoders has; () for FLUX, which reads states of T5 alone."""
        return () if self.is_flux else tuple(layers for clip in self.clips for layers in clip.clip_layers)

    @torch.no_grad()
    def encode(self, texts: Sequence[str | None], clip_skip: int = 0) -> Conditioning:
        """States and pooled text of each text, each distinct one encoded alone; None is the empty text.

        clip_skip leaves out so many layers more of SD3's CLIP. Raises ConfigError for an impossible one.
        """
        for clip in () if self.is_flux else self.clips:
            clip.check_skip(clip_skip + 1)
        return one_by_one([text or "" for text in texts], lambda text: self._encode([text], clip_skip))

    @torch.no_grad()
    def encode_together(self, texts: list[str]) -> Conditioning:
        """As `encode`, in batches of 64: faster, but a text's bits depend on the batch that it is in."""
        return Conditioning.cat(self._encode(texts[i : i + 64], 0) for i in range(0, len(texts), 64))

    def _encode(self, texts: list[str], clip_skip: int) -> Conditioning:
        if self.is_flux:
            sides = [self.first.states(self.first.tokenize(texts))]
        else:
            sides = [clip.states(clip.tokenize(texts), clip_skip + 1, norm=False) for clip in self.clips]
        return self.joined([side.states for side in sides], [side.pooled for side in sides], texts)

    def of_chunks(self, sides: Sequence[Side], prompt: Tokens) -> Conditioning:
        """As `joined`."""
        return self.joined([states for states, _ in sides], [pooled for _, pooled in sides], [prompt.plain])

    def joined(self, states: Sequence[Tensor], pooled: Sequence[Tensor | None], texts: list[str]) -> Conditioning:
        """What the transformer gets, from each CLIP encoder's states (B, S, D') and pooled text, and what T5 reads."""
        long = (
            self._t5_states(texts) if self.t5 is not None else states[0].new_zeros(len(texts), self.tokens, self.width)
        )
        joined = torch.cat([one for one in pooled if one is not None], dim=-1)
        if self.is_flux:
            return Conditioning(long, joined)
        short = torch.cat(list(states), dim=-1)
        short = F.pad(short, (0, self.width - short.shape[-1]))
        return Conditioning(torch.cat([short, long.to(short)], dim=1), joined)

    def _t5_states(self, texts: list[str]) -> Tensor:
        assert self.t5 is not None
        return self.t5.padded_states(texts, self.tokens)

    def truncated(self, text: str) -> str:
        """The end of the text that none of the encoders of the states reads; "" if all of it is read."""
        return self.first.truncated(text) if self.t5 is None else self.t5.truncated(text, self.tokens)

    def unknown_words(self, text: str) -> list[str]:
        """Words, each once, that an encoder was never trained on, as far as that is known."""
        return list(dict.fromkeys(word for one in self.encoders for word in one.unknown_words(text)))
