"""Prompts with weights and of any length, as A1111 encodes them: chunk by chunk, each token's state times its weight.

A chunk is what the encoder takes at once, 75 tokens of CLIP's 77 between start and end. Its states are weighted after
the encoder has seen it whole; an image's text is the chunks' states one after the other.

Shapes:  S tokens of a chunk   D width of the states   P width of the pooled text   N chunks
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.errors import ConfigError, nearest
from ldm.nn.text.conditioning import Chunk, Conditioning, Side, Tokens
from ldm.prompts import BREAK, EMPHASIS, Piece

if TYPE_CHECKING:
    from ldm.nn.text import TextEncoder
    from ldm.nn.text.clip import ClipText
    from ldm.nn.text.open_clip import OpenClipText

ROUNDING = 1e-6  # a mean that is smaller than this share of the mean magnitude says nothing
NEAR = 20 / 75  # of a chunk: how far back a comma may be; A1111 looks back over 20 tokens


def tokenize(text: TextEncoder, prompt: Sequence[Piece] | None) -> Tokens:
    """The tokens of a prompt's pieces; None is what it is for text.encode. Raises ConfigError for emphasis with T5."""
    pieces = [Piece("", 1.0)] if prompt is None else prompt
    if text.reads_t5:
        check_plain(pieces)
    plain = "".join(piece.text for piece in pieces if piece is not BREAK)
    return Tokens(tuple(chunks_of(part, pieces)[: text.most_chunks] for part in text.clips), plain, prompt is None)


@torch.no_grad()
def encode_weighted(
    text: TextEncoder, prompts: Sequence[Tokens], clip_skip: int = 0, emphasis: str = "original", chunks: int = 1
) -> Conditioning:
    """States (B, N * S, D) of prompts in A1111's grammar, and the pooled text of their first chunks (B, P).

    N is that of the longest prompt, and at least `chunks`; shorter ones go on with empty chunks. The bits of a prompt
    depend on the others through N alone. Raises ConfigError: unknown emphasis, impossible clip_skip, no prompts.
    """
    if emphasis not in EMPHASIS:
        raise ConfigError(f"unknown emphasis {emphasis!r:.80}", where="emphasis", hint=nearest(str(emphasis), EMPHASIS))
    if not prompts:
        raise ConfigError("there is no text to encode")
    back = clip_skip + text.left_out_always
    if back:
        text.check_skip(clip_skip)
    most = max(chunks, *(prompt.chunks for prompt in prompts))
    rows = []
    for prompt in prompts:
        filled = [own + [[]] * (most - len(own)) for own in prompt.parts]
        normed = not text.left_out_always
        sides = [_side(part, own, back, normed, emphasis) for part, own in zip(text.clips, filled)]
        rows.append(text.of_chunks(sides, prompt))
    return Conditioning.cat(rows)


def cut_off(text: TextEncoder, prompt: str) -> str:
    """The end of a prompt without notation that `encode_weighted` does not read: of a long one for T5, which cuts."""
    return text.truncated(prompt) if text.reads_t5 else ""


def reads_with_t5(text: TextEncoder) -> bool:
    """Whether T5 reads prompts, alone or beside CLIP, and so no emphasis can be in them."""
    return text.reads_t5


def chunks_of(part: ClipText | OpenClipText, pieces: Sequence[Piece]) -> list[Chunk]:
    """The tokens in chunks, at least one: BREAK ends one, and a full one ends at the last comma near its end."""
    size = part.max_length - 2
    tokens: list[Any] = [
        BREAK if piece is BREAK else [(t, piece.weight) for t in part.token_ids(piece.text)] for piece in pieces
    ]
    if BREAK not in tokens and sum(map(len, tokens)) <= size:
        return [[token for of_piece in tokens for token in of_piece]]
    return _parted(tokens, size, part.token_ids(","))


def _parted(tokens: Sequence[Any], size: int, commas: list[int]) -> list[Chunk]:
    """The tokens of each piece, or BREAK, as chunks of at most `size`; `commas` is a comma's token in a list."""
    near = int(size * NEAR)
    done: list[Chunk] = []
    chunk: Chunk = []
    comma = -1  # position of the last one in the chunk
    for of_piece in tokens:
        if of_piece is BREAK:
            done.append(chunk)
            chunk, comma = [], -1
            continue
        for token, weight in of_piece:
            if len(chunk) == size:
                cut = comma + 1 if comma >= 0 and size - comma <= near and [token] != commas else size
                done.append(chunk[:cut])
                chunk, comma = chunk[cut:], -1
            elif [token] == commas:
                comma = len(chunk)
            chunk.append((token, weight))
    return [*done, chunk] if chunk or not done else done


def _side(part: ClipText | OpenClipText, chunks: list[Chunk], back: int, norm: bool, emphasis: str) -> Side:
    """One encoder's states (1, N * S, D) of all chunks and the pooled text (1, P) of the first."""
    sides = []
    for chunk in chunks:
        cond = part.states(part.with_special_tokens([token for token, _ in chunk]), back, norm)
        states = cond.states
        if any(weight != 1 for _, weight in chunk):
            weights = torch.ones(part.max_length, device=states.device)
            weights[1 : 1 + len(chunk)] = torch.tensor([weight for _, weight in chunk])
            states = weighted(states, weights, emphasis)
        sides.append((states, cond.pooled))
    return torch.cat([states for states, _ in sides], dim=1), sides[0][1]


def weighted(states: Tensor, weights: Tensor, emphasis: str) -> Tensor:
    """states (1, S, D) times weights (S,), in fp32; for "original" scaled to the mean over all that they had before.

    Not where that mean is nothing but what rounding left, as after a layer norm that was never trained.
    """
    before = states.float()
    after = before * weights[:, None]
    if emphasis == "original":
        mean, now = before.mean(), after.mean()
        after = after * torch.where(now.abs() > ROUNDING * after.abs().mean(), mean / now, 1.0)
    return after.to(states.dtype)


def check_plain(pieces: Sequence[Piece]) -> None:
    """Raise ConfigError for emphasis and BREAK, which T5 does not take."""
    if any(piece is BREAK or piece.weight != 1 for piece in pieces):
        hint = "write it without, or a backslash before a bracket that means itself"
        raise ConfigError("emphasis and BREAK are CLIP's, and this model reads with T5", where="prompt", hint=hint)
