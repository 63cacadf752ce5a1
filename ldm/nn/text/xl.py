"""The two CLIP text encoders of Stable Diffusion XL, side by side (Podell et al. 2023).

Shapes:  B texts   S tokens   D width of the states, of both together   P width of the pooled text
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ldm.errors import ModelError
from ldm.nn.text.clip import ClipText
from ldm.nn.text.conditioning import Conditioning, InChunks, SeveralNetworks, Side, Tokens, one_by_one
from ldm.nn.text.open_clip import OpenClipText


class XLText(SeveralNetworks, InChunks):
    """States of both encoders' last layer but one, without the final norm; pooled is the second's projected text.

    Raises ModelError where the second does not project, or the two do not take equally many tokens.
    """

    left_out_always = 1

    def __init__(self, first: ClipText, second: ClipText | OpenClipText, zero_empty: bool):
        self.first, self.second = first, second
        self.zero_empty = zero_empty  # None becomes zeros; else it is encoded as ""
        self.width: int = first.width + second.width
        self.max_length: int = first.max_length
        if second.max_length != first.max_length:
            raise ModelError(f"one text encoder takes {first.max_length} tokens, the other {second.max_length}")
        if not second.projects:
            raise ModelError("the second text encoder has no projection, and pooled text is made of it")

    @property
    def encoders(self) -> tuple[ClipText, ClipText | OpenClipText]:
        return self.first, self.second

    @property
    def clips(self) -> tuple[ClipText, ClipText | OpenClipText]:
        """Both, which read the chunks of a prompt."""
        return self.encoders

    def of_chunks(self, sides: Sequence[Side], prompt: Tokens) -> Conditioning:
        """Both sides' states beside each other, and the second's pooled text; no text as `zero_empty` says."""
        cond = Conditioning(torch.cat([states for states, _ in sides], dim=-1), sides[-1][1])  # (1, N * S, D), (1, P)
        return cond.zeros() if prompt.absent and self.zero_empty else cond

    @property
    def clip_layers(self) -> tuple[int, ...]:
        """How many layers each of them has."""
        return (*self.first.clip_layers, *self.second.clip_layers)

    @torch.no_grad()
    def encode(self, texts: Sequence[str | None], clip_skip: int = 0) -> Conditioning:
        """States (B, S, D) and pooled (B, P), each distinct text alone; "" is encoded, None as `zero_empty` says.

        clip_skip leaves out so many layers more, as in diffusers. Raises ConfigError for an impossible one.
        """
        self.check_skip(clip_skip)
        return one_by_one(texts, lambda text: self._encode(text, clip_skip + 1))

    @torch.no_grad()
    def encode_together(self, texts: Sequence[str | None]) -> Conditioning:
        """As `encode`, in batches of 64: faster, but a text's bits depend on the batch that it is in."""
        parts = []
        for some in (list(texts[i : i + 64]) for i in range(0, len(texts), 64)):
            words = [text or "" for text in some]
            first, second = (part.states(part.tokenize(words), 1, norm=False) for part in (self.first, self.second))
            cond = Conditioning(torch.cat([first.states, second.states], dim=-1), second.pooled)
            none = torch.tensor([text is None and self.zero_empty for text in some], device=cond.states.device)
            zeros = cond.zeros()
            assert cond.pooled is not None and zeros.pooled is not None  # of the second's projection
            states = torch.where(none[:, None, None], zeros.states, cond.states)
            parts.append(Conditioning(states, torch.where(none[:, None], zeros.pooled, cond.pooled)))
        return Conditioning.cat(parts)

    def _encode(self, text: str | None, back: int) -> Conditioning:
        first, second = (part.without_norm(text or "", back) for part in (self.first, self.second))
        cond = Conditioning(torch.cat([first.states, second.states], dim=-1), second.pooled)
        return cond.zeros() if text is None and self.zero_empty else cond

    def truncated(self, text: str) -> str:
        """The end of the text that does not fit into max_length tokens; "" if all of it does."""
        return self.first.truncated(text)  # both have CLIP's words

    def unknown_words(self, text: str) -> list[str]:
        """Words, each once, that either encoder was never trained on, as far as that is known."""
        return list(dict.fromkeys(self.first.unknown_words(text) + self.second.unknown_words(text)))
