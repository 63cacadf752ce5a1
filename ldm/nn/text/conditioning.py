"""What every text encoder hands to the U-Net, and what they share.

Shapes:  B texts   S tokens   D width of the states   P width of the pooled text
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.device import sent
from ldm.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from typing import Self

MaybeText = TypeVar("MaybeText", bound=str | None)


@dataclass(frozen=True)
class Conditioning:
    """What any text encoder hands to the U-Net; CLIP has no mask, T5 no pooled text."""

    states: Tensor  # (B, S, D)
    pooled: Tensor | None = None  # (B, P)
    mask: Tensor | None = None  # (B, S) bool, True = a token to attend to; None = all of them

    def __len__(self) -> int:
        return len(self.states)

    @property
    def inputs(self) -> dict[str, Tensor | None]:
        """The keywords of UNet.forward."""
        return {"states": self.states, "mask": self.mask, "pooled": self.pooled}

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Conditioning:
        """The texts of a slice or a list of positions (repeated ones too); an int gives a batch of one."""
        if isinstance(index, int):
            index = [index]
        return self._map(lambda t: t[index])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """Moves all, casts all but the mask."""
        device = torch.device(device)
        return self._map(lambda t: sent(t, device, None if t.dtype == torch.bool else dtype))

    @classmethod
    def cat(cls, parts: Iterable[Conditioning]) -> Conditioning:
        """One after the other; shorter states are padded with zeros that the mask leaves out. Raises ModelError."""
        parts = list(parts)
        if len({part.states.shape[-1] for part in parts}) != 1:
            raise ModelError("texts of different encoders cannot be put together")
        if len({part.pooled is None for part in parts}) != 1:
            raise ModelError("some of the texts have pooled text and others have none: they cannot be put together")
        longest = max(part.states.shape[1] for part in parts)
        padded = [one if one.states.shape[1] == longest else one._padded(longest) for one in parts]
        pooled = [part.pooled for part in parts if part.pooled is not None]  # of all or of none
        masked = any(part.mask is not None for part in padded)
        return cls(
            torch.cat([part.states for part in padded]),
            torch.cat(pooled) if pooled else None,
            torch.cat([part._full_mask() for part in padded]) if masked else None,
        )

    def _padded(self, length: int) -> Conditioning:
        short = length - self.states.shape[1]
        return Conditioning(F.pad(self.states, (0, 0, 0, short)), self.pooled, F.pad(self._full_mask(), (0, short)))

    def _full_mask(self) -> Tensor:
        return self.states.new_ones(self.states.shape[:2], dtype=torch.bool) if self.mask is None else self.mask

    def zeros(self) -> Conditioning:
        """What stands for no text at all with some models of XL: zeros of the same shapes."""
        return self._map(torch.zeros_like)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        pooled, mask = (None if t is None else function(t) for t in (self.pooled, self.mask))
        return Conditioning(function(self.states), pooled, mask)


Chunk = list[tuple[int, float]]  # (token, weight)
Side = tuple[Tensor, Tensor | None]  # one encoder's states (1, N * S, D) of N chunks, and the pooled text (1, P)


@dataclass(frozen=True)
class Tokens:
    """A prompt as a text encoder reads it; `tokenize` makes it."""

    parts: tuple[list[Chunk], ...]  # the chunks for each of CLIP's encoders; () for T5
    plain: str = ""  # what T5 reads
    absent: bool = False  # there is no text: zeros for some models of XL

    @property
    def chunks(self) -> int:
        return max((len(chunks) for chunks in self.parts), default=1)


class InChunks:
    """How a text encoder reads prompts in A1111's notation: what `weighting` asks of it, answered as one CLIP does."""

    reads_t5: bool = False  # T5 reads too, which takes no emphasis
    left_out_always: int = 0  # layers of CLIP beside clip_skip; the states are then those before the final norm
    most_chunks: int | None = None  # that are read; None: all

    @property
    def clips(self) -> tuple[Any, ...]:
        """The encoders of CLIP that read the chunks."""
        return (self,)

    def check_skip(self, clip_skip: int) -> None:
        """Raise ConfigError where no layer would be left."""
        for clip in self.clips:
            clip.check_skip(clip_skip + self.left_out_always)

    def of_chunks(self, sides: Sequence[Side], prompt: Tokens) -> Conditioning:
        """What the network gets of a prompt, from what each of `clips` made of it."""
        return Conditioning(*sides[0])


class OneNetwork:
    """A text encoder that owns one network, `model`."""

    model: nn.Module

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Every network that it owns: to move, freeze, save or adapt."""
        return (self.model,)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, *args, **kwargs) -> Self:
        """Moves the weights, as Module.to does; returns itself."""
        self.model.to(*args, **kwargs)
        return self


class SeveralNetworks:
    """A text encoder that puts several together; the first gives dtype and device."""

    @property
    def encoders(self) -> tuple[OneNetwork, ...]:
        """Its encoders, in their order."""
        raise NotImplementedError

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Every network that they own, in their order."""
        return tuple(module for encoder in self.encoders for module in encoder.modules)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoders[0].dtype

    @property
    def device(self) -> torch.device:
        return self.encoders[0].device

    def to(self, *args, **kwargs) -> Self:
        """Moves the weights, as Module.to does; returns itself."""
        for encoder in self.encoders:
            encoder.to(*args, **kwargs)
        return self


def check_skip(clip_skip: int, layers: int) -> None:
    """Raise ConfigError where no layer would be left of so many."""
    if not 0 <= clip_skip < layers:
        raise ConfigError(f"clip_skip {clip_skip} is impossible: the text encoder has {layers} layers")


def one_by_one(texts: Sequence[MaybeText], encode: Callable[[MaybeText], Conditioning]) -> Conditioning:
    """`encode` of each distinct text alone, so that its bits do not depend on the others, in the order of `texts`.

    Raises ConfigError where there is none.
    """
    if not texts:
        raise ConfigError("there is no text to encode")
    distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    return Conditioning.cat(encode(text) for text in distinct)[[distinct[text] for text in texts]]


def spelt(text: str) -> list[str]:
    """The words and numbers of a text, lower case, each once, in order; behind them its symbols, as emoji and ★ are.

    Punctuation is none of these.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)  # é of one character or of two is one letter
    words = re.findall(r"[^\W\d_]+|\d+", text.lower())
    return list(dict.fromkeys(words if text.isascii() else [*words, *_symbols(text)]))


def _symbols(text: str) -> list[str]:
    """Every character beyond ASCII that is neither letter, number, mark, space nor punctuation."""
    return [c for c in text if not c.isascii() and unicodedata.category(c) in ("So", "Sm", "Sc", "Co", "Cn")]


def known_words(captions: Iterable[str]) -> frozenset[str]:
    """Every word of the captions that a text encoder is trained on."""
    return frozenset(word for caption in captions for word in spelt(caption))
