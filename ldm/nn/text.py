"""Text encoders: prompts to the one `Conditioning` that a U-Net is called with.

Shapes:  B texts   S tokens   D width of the states   P width of the pooled text
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Conditioning:
    """What any text encoder hands to the U-Net; CLIP has no mask, T5 no pooled text."""

    states: Tensor  # (B, S, D)
    pooled: Tensor | None = None  # (B, P)
    mask: Tensor | None = None  # (B, S) bool, True = a token to attend to; None = all of them

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Conditioning:
        """The texts of a slice or a list of positions (repeated ones too); an int gives a batch of one."""
        if isinstance(index, int):
            index = [index]
        return self._map(lambda t: t[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Moves all, casts all but the mask."""
        return self._map(lambda t: t.to(device=device, dtype=None if t.dtype == torch.bool else dtype))

    @classmethod
    def cat(cls, parts: Iterable[Conditioning]) -> Conditioning:
        """One after the other. Shorter states are padded with zeros that the mask leaves out.

        Raises ModelError where widths differ or only some parts have pooled text.
        """
        parts = list(parts)
        if len({part.states.shape[-1] for part in parts}) != 1 or len({part.pooled is None for part in parts}) != 1:
            raise ModelError("texts of different encoders cannot be put together")
        longest = max(part.states.shape[1] for part in parts)
        padded = [part._padded(longest) for part in parts]
        masked = any(part.mask is not None for part in padded)
        return cls(
            torch.cat([part.states for part in padded]),
            None if parts[0].pooled is None else torch.cat([part.pooled for part in padded]),
            torch.cat([part._full_mask() for part in padded]) if masked else None,
        )

    def _padded(self, length: int) -> Conditioning:
        short = length - self.states.shape[1]
        if not short:
            return self
        return Conditioning(F.pad(self.states, (0, 0, 0, short)), self.pooled, F.pad(self._full_mask(), (0, short)))

    def _full_mask(self) -> Tensor:
        return self.states.new_ones(self.states.shape[:2], dtype=torch.bool) if self.mask is None else self.mask

    def _map(self, function) -> Conditioning:
        return Conditioning(*(None if t is None else function(t) for t in (self.states, self.pooled, self.mask)))


class ClipText:
    """A CLIP text encoder of transformers with its tokenizer, as SD 1.x and 2.x use it.

    Raises ModelError where the two do not belong together; above all where the end-of-text token that the model pools
    at is not the tokenizer's, since transformers then pools some other position without a word.
    """

    def __init__(
        self,
        model: CLIPTextModel | CLIPTextModelWithProjection,
        tokenizer: PreTrainedTokenizerBase,
        words: frozenset[str] | None = None,  # those it was trained on, where they are few and known
    ):
        self.model, self.tokenizer, self.words = model, tokenizer, words
        self._lock = threading.Lock()  # fast tokenizers keep their padding and truncation as state
        config = model.config
        self.width: int = config.hidden_size
        self.max_length: int = min(tokenizer.model_max_length, config.max_position_embeddings)
        end, size = tokenizer.eos_token_id, len(tokenizer)
        if size > config.vocab_size:
            raise ModelError(f"the tokenizer has {size} tokens, the text encoder only {config.vocab_size}")
        legacy = config.eos_token_id == 2 and end == size - 1  # transformers then takes the highest id: right if last
        if config.eos_token_id != end and not legacy:
            todo = f"set eos_token_id to {end} in the text encoder's config.json"
            raise ModelError(
                f"the text encoder pools at token {config.eos_token_id}, the tokenizer ends with {end}", todo=todo
            )

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, *args, **kwargs) -> ClipText:
        """Moves the weights, as Module.to does; returns itself."""
        self.model.to(*args, **kwargs)
        return self

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token ids (B, S), S = max_length: cut or padded."""
        kwargs = {"padding": "max_length", "truncation": True, "max_length": self.max_length}
        with self._lock:
            return self.tokenizer(list(texts), return_tensors="pt", **kwargs).input_ids

    @torch.no_grad()
    def encode(self, texts: list[str], clip_skip: int = 0) -> Conditioning:
        """States (B, S, D), and the pooled text: projected (B, P) where the model projects, else (B, D).

        Each distinct text is encoded alone, so that its bits do not depend on the others. clip_skip counts as in
        diffusers: 1 takes the layer before the last, through the final norm. Raises ConfigError for an impossible one.
        """
        layers = self.model.config.num_hidden_layers
        if not 0 <= clip_skip < layers:
            raise ConfigError(f"clip_skip {clip_skip} is impossible: the text encoder has {layers} layers")
        if not texts:
            raise ConfigError("there is no text to encode")
        distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        parts = [self._encode_ids(row[None], clip_skip) for row in self.tokenize(list(distinct))]
        return Conditioning.cat(parts)[[distinct[text] for text in texts]]

    def _encode_ids(self, ids: Tensor, clip_skip: int) -> Conditioning:
        out = self.model(ids.to(self.device), output_hidden_states=clip_skip > 0)
        states, pooled = out.last_hidden_state, getattr(out, "text_embeds", None)
        if clip_skip:
            tower = getattr(self.model, "text_model", self.model)  # transformers 5 has no text_model in CLIPTextModel
            states = tower.final_layer_norm(out.hidden_states[-1 - clip_skip])
        return Conditioning(states, out.pooler_output if pooled is None else pooled)

    def truncated(self, text: str) -> str:
        """The end of the text that does not fit into max_length tokens; "" if all of it does."""
        with self._lock:
            ids = self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return self.tokenizer.decode(ids[self.max_length - 2 :]).strip()  # less the start and the end token

    def unknown_words(self, text: str) -> list[str]:
        """Words, each once, that the encoder was never trained on, as far as that is known.

        Without a list of its words, as for CLIP's own, only what becomes the unknown token's id.
        """
        found = spelt(text)
        if self.words is not None:
            return [word for word in found if word not in self.words]
        ends = {self.tokenizer.unk_token, self.tokenizer.eos_token}
        return [word for word in found if any(piece in ends for piece in self.tokenizer.tokenize(word))]


def spelt(text: str) -> list[str]:
    """The words of a text, lower case, each once, in order; numbers and punctuation are none."""
    return list(dict.fromkeys(re.findall(r"[^\W\d_]+", text.lower())))


def known_words(captions: Iterable[str]) -> frozenset[str]:
    """Every word of the captions that a text encoder is trained on."""
    return frozenset(word for caption in captions for word in spelt(caption))
