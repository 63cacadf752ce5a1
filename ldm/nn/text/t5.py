"""T5's encoder (Raffel et al. 2020) with an attention mask and no pooled text.

Shapes:  B texts   S tokens   D width of the states
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ldm.errors import ConfigError, ModelError
from ldm.nn.text.conditioning import Conditioning, InChunks, OneNetwork, Side, Tokens, one_by_one, spelt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, T5EncoderModel

LONGEST = 512  # tokens, where the tokenizer names no limit: T5 has none itself


class T5Text(OneNetwork, InChunks):
    """T5EncoderModel with its tokenizer. Raises ModelError where the two do not belong together."""

    model: T5EncoderModel
    clip_layers: tuple[int, ...] = ()
    clips: tuple[()] = ()
    reads_t5 = True

    def __init__(self, model: T5EncoderModel, tokenizer: PreTrainedTokenizerFast):
        self.model, self.tokenizer = model, tokenizer
        self._lock = threading.Lock()  # fast tokenizers keep their padding and truncation as state
        config = model.config
        self.width: int = config.d_model
        self.max_length: int = min(tokenizer.model_max_length, LONGEST)
        if len(tokenizer) > config.vocab_size:
            raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, the text encoder only {config.vocab_size}")
        for name in ("eos_token_id", "pad_token_id"):
            ours, theirs = getattr(config, name), getattr(tokenizer, name)
            if ours != theirs:
                raise ModelError(f"{name} is {ours} for the text encoder and {theirs} for the tokenizer")

    @torch.no_grad()
    def encode(self, texts: Sequence[str | None], clip_skip: int = 0) -> Conditioning:
        """States (B, S, D), zeros after the text's end, and the mask (B, S); S = max_length, None is the empty text.

        Each distinct text is encoded alone, so that its bits do not depend on the others. Raises ConfigError for any
        clip_skip: that belongs to CLIP.
        """
        self.check_skip(clip_skip)
        return one_by_one([text or "" for text in texts], lambda text: self._states([text]))

    @torch.no_grad()
    def encode_together(self, texts: list[str]) -> Conditioning:
        """As `encode`, in batches of 64: faster, but a text's bits depend on the batch that it is in."""
        return Conditioning.cat(self._states(texts[i : i + 64]) for i in range(0, len(texts), 64))

    def check_skip(self, clip_skip: int) -> None:
        """Raise ConfigError for any: that belongs to CLIP."""
        if clip_skip:
            raise ConfigError(f"clip_skip {clip_skip} is impossible: the text encoder is T5, not CLIP")

    def of_chunks(self, sides: Sequence[Side], prompt: Tokens) -> Conditioning:
        """T5's own reading of the whole text."""
        return self.encode([prompt.plain])

    def _states(self, texts: list[str]) -> Conditioning:
        kwargs = {"padding": "max_length", "truncation": True, "max_length": self.max_length}
        with self._lock:
            found = self.tokenizer(texts, return_tensors="pt", **kwargs)
        ids, mask = found.input_ids.to(self.device), found.attention_mask.to(self.device)
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return Conditioning(states * mask[..., None].to(states.dtype), mask=mask.bool())

    def padded_states(self, texts: list[str], length: int) -> torch.Tensor:
        """(B, length, D) of texts that are cut or padded, padding being read as tokens too: as SD3 and FLUX have it."""
        with self._lock:
            found = self.tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=length)
        return self.model(input_ids=found.input_ids.to(self.device)).last_hidden_state

    def truncated(self, text: str, length: int | None = None) -> str:
        """The end of the text that does not fit into `length` (max_length) tokens; "" if all of it does."""
        length = length or self.max_length
        with self._lock:
            ids = self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return str(self.tokenizer.decode(ids[length - 1 :])).strip()  # less the end token

    def unknown_words(self, text: str) -> list[str]:
        """Words, each once, of which a part is no token of the tokenizer's."""
        unknown = self.tokenizer.unk_token_id
        return [word for word in spelt(text) if unknown in self._ids(word)]

    def _ids(self, word: str) -> list[int]:
        with self._lock:
            return self.tokenizer(word, add_special_tokens=False, truncation=False).input_ids
