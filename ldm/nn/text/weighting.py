"""Prompts with weights and of any length, as A1111 encodes them: chunk by chunk, each token's state times its weight.

A chunk is what the encoder takes at once, 75 tokens of CLIP's 77 between start and end. Its states are weighted after
the encoder has seen it whole; a picture's text is the chunks' states one after the other.

Shapes:  S tokens of a chunk   D width of the states   P width of the pooled text   N chunks
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.errors import ConfigError, nearest
from ldm.nn.text.conditioning import Conditioning, one_by_one
from ldm.nn.text.t5 import T5Text
from ldm.nn.text.xl import XLText
from ldm.prompts import BREAK, EMPHASIS, parse

if TYPE_CHECKING:
    from ldm.nn.text import TextEncoder
    from ldm.nn.text.clip import ClipText
    from ldm.nn.text.open_clip import OpenClipText

ROUNDING = 1e-6  # a mean that is smaller than this share of the mean magnitude says nothing
NEAR = 20 / 75  # of a chunk: how far back a comma may be; A1111 looks back over 20 tokens

Chunk = list[tuple[int, float]]  # (token, weight)


@torch.no_grad()
def encode_weighted(
    text: TextEncoder, prompts: Sequence[str | None], clip_skip: int = 0, emphasis: str = "original", chunks: int = 1
) -> Conditioning:
    """States (B, N * S, D) of prompts in A1111's grammar, and the pooled text of their first chunks (B, P).

    Prompt editing has been resolved (`at_steps`). N is that of the longest prompt, and at least `chunks`; shorter ones
    go on with empty chunks. Each distinct prompt is encoded alone and chunk by chunk, so that its bits depend on the
    others through N alone. One chunk without emphasis has the bits of text.encode. None is what it is for text.encode.
    T5 has no chunks and takes no emphasis. Raises ConfigError for an unknown emphasis, an impossible clip_skip, and
    what `parse` refuses.
    """
    if emphasis not in EMPHASIS:
        raise ConfigError(f"unknown emphasis {emphasis!r:.80}", where="emphasis", todo=nearest(str(emphasis), EMPHASIS))
    if isinstance(text, T5Text):
        return text.encode([None if prompt is None else _plain(prompt) for prompt in prompts], clip_skip)
    xl = isinstance(text, XLText)
    parts, back = ((text.first, text.second), clip_skip + 1) if xl else ((text,), clip_skip)
    for part in parts:
        part.check_skip(back)
    split = {prompt: [chunks_of(part, prompt or "") for part in parts] for prompt in dict.fromkeys(prompts)}
    most = max([chunks, *(len(own) for found in split.values() for own in found)])

    def encode(prompt: str | None) -> Conditioning:
        sides = [
            _side(part, own + [[]] * (most - len(own)), back, not xl, emphasis)
            for part, own in zip(parts, split[prompt])
        ]
        states = torch.cat([states for states, _ in sides], dim=-1)  # (1, N * S, D)
        pooled = sides[-1][1]
        if prompt is None and xl and text.zero_empty:
            return Conditioning(torch.zeros_like(states), torch.zeros_like(pooled))
        return Conditioning(states, pooled)

    return one_by_one(list(prompts), encode)


def count_chunks(text: TextEncoder, prompt: str | None) -> int:
    """How many chunks `encode_weighted` makes of a prompt; 1 for T5, which cuts."""
    if isinstance(text, T5Text):
        return 1
    parts = (text.first, text.second) if isinstance(text, XLText) else (text,)
    return max(len(chunks_of(part, prompt or "")) for part in parts)


def cut_off(text: TextEncoder, prompt: str) -> str:
    """The end of a prompt without notation that `encode_weighted` does not read: of a long one for T5, which cuts."""
    return text.truncated(prompt) if isinstance(text, T5Text) else ""


def chunks_of(part: ClipText | OpenClipText, prompt: str) -> list[Chunk]:
    """The prompt's tokens in chunks. BREAK ends one; a full one ends at the last comma, where that is near its end.

    At least one chunk, which may be empty; no empty one at the end of a prompt.
    """
    size, commas = part.max_length - 2, part.token_ids(",")
    near = int(size * NEAR)
    done: list[Chunk] = []
    chunk: Chunk = []
    comma = -1  # position of the last one in the chunk
    for piece in parse(prompt):
        if piece is BREAK:
            done.append(chunk)
            chunk, comma = [], -1
            continue
        for token in part.token_ids(piece.text):
            if len(chunk) == size:
                cut = comma + 1 if comma >= 0 and size - comma <= near and [token] != commas else size
                done.append(chunk[:cut])
                chunk, comma = chunk[cut:], -1
            elif [token] == commas:
                comma = len(chunk)
            chunk.append((token, piece.weight))
    return [*done, chunk] if chunk or not done else done


def _side(
    part: ClipText | OpenClipText, chunks: list[Chunk], back: int, norm: bool, emphasis: str
) -> tuple[Tensor, Tensor]:
    """One encoder's states (1, N * S, D) of all chunks and the pooled text (1, P) of the first."""
    found = []
    for chunk in chunks:
        cond = part.states(part.framed([token for token, _ in chunk]), back, norm)
        weights = torch.ones(part.max_length, device=cond.states.device)
        weights[1 : 1 + len(chunk)] = torch.tensor([weight for _, weight in chunk])
        found.append((weighted(cond.states, weights, emphasis), cond.pooled))
    return torch.cat([states for states, _ in found], dim=1), found[0][1]


def weighted(states: Tensor, weights: Tensor, emphasis: str) -> Tensor:
    """states (1, S, D) times weights (S,), in fp32; for "original" scaled to the mean over all that they had before.

    Not where that mean is nothing but what rounding left, as after a layer norm that was never trained.
    """
    if (weights == 1).all():
        return states
    before = states.float()
    after = before * weights[:, None]
    if emphasis == "original":
        mean, now = before.mean(), after.mean()
        after = after * torch.where(now.abs() > ROUNDING * after.abs().mean(), mean / now, 1.0)
    return after.to(states.dtype)


def _plain(prompt: str) -> str:
    pieces = parse(prompt)
    if any(piece is BREAK or piece.weight != 1 for piece in pieces):
        todo = "write it without, or a backslash before a bracket that means itself"
        raise ConfigError("emphasis and BREAK are CLIP's, and this model reads with T5", where="prompt", todo=todo)
    return pieces[0].text
