"""CLIP's text encoder, as SD 1.x and 2.x use it.

Shapes:  B texts   S tokens   D width of the states   P width of the pooled text
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.device import sent
from ldm.errors import ModelError
from ldm.nn.text.conditioning import Conditioning, InChunks, OneNetwork, check_skip, one_by_one, spelt

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase


class ClipText(OneNetwork, InChunks):
    """A CLIP text encoder of transformers with its tokenizer, as SD 1.x and 2.x use it.

    Raises ModelError where the two do not belong together; above all where the end-of-text token that the model pools
    at is not the tokenizer's, since transformers then pools some other position without a word.
    """

    model: CLIPTextModel | CLIPTextModelWithProjection

    def __init__(
        self,
        model: CLIPTextModel | CLIPTextModelWithProjection,
        tokenizer: PreTrainedTokenizerBase,
        words: frozenset[str] | None = None,  # those it was trained on, where they are few and known
    ):
        self.model, self.tokenizer, self.words = model, tokenizer, words
        self._lock = threading.Lock()  # fast tokenizers keep their padding and truncation as state
        config = model.config
        self.projects: bool = type(model).__name__.endswith("WithProjection")
        self.width: int = config.hidden_size
        self.max_length: int = min(tokenizer.model_max_length, config.max_position_embeddings)
        end, size = tokenizer.eos_token_id, len(tokenizer)
        if size > config.vocab_size:
            raise ModelError(f"the tokenizer has {size} tokens, the text encoder only {config.vocab_size}")
        legacy = config.eos_token_id == 2 and end == size - 1  # transformers then takes the highest id: right if last
        if config.eos_token_id != end and not legacy:
            what = f"the text encoder pools at token {config.eos_token_id}, the tokenizer ends with {end}"
            raise ModelError(what, hint=f"set eos_token_id to {end} in the text encoder's config.json")

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token ids (B, S), S = max_length: cut or padded."""
        kwargs = {"padding": "max_length", "truncation": True, "max_length": self.max_length}
        with self._lock:
            return self.tokenizer(list(texts), return_tensors="pt", **kwargs).input_ids

    def token_ids(self, text: str) -> list[int]:
        """All of a text's tokens, without start and end."""
        with self._lock:
            return self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids

    def with_special_tokens(self, tokens: list[int]) -> Tensor:
        """Token ids (1, S), S = max_length, of at most S - 2 tokens: with start and end, padded."""
        ids = [self.tokenizer.bos_token_id, *tokens, self.tokenizer.eos_token_id]
        return torch.tensor([ids + [self.tokenizer.pad_token_id] * (self.max_length - len(ids))])

    @torch.no_grad()
    def encode(self, texts: Sequence[str | None], clip_skip: int = 0) -> Conditioning:
        """States (B, S, D), and the pooled text: projected (B, P) where the model projects, else (B, D).

        Each distinct text is encoded alone, so that its bits do not depend on the others; None is the empty text.
        clip_skip counts as in diffusers: 1 takes the layer before the last, through the final norm. Raises ConfigError
        for an impossible one.
        """
        self.check_skip(clip_skip)
        return one_by_one([text or "" for text in texts], lambda text: self.states(self.tokenize([text]), clip_skip))

    @torch.no_grad()
    def encode_together(self, texts: list[str]) -> Conditioning:
        """As `encode`, in batches of 64: faster, but a text's bits depend on the batch that it is in."""
        return Conditioning.cat(self.states(ids) for ids in self.tokenize(texts).split(64))

    @property
    def clip_layers(self) -> tuple[int, ...]:
        """How many layers the encoder has."""
        return (self.model.config.num_hidden_layers,)

    def check_skip(self, clip_skip: int) -> None:
        """Raise ConfigError where no layer would be left."""
        check_skip(clip_skip, *self.clip_layers)

    def without_norm(self, text: str, back: int) -> Conditioning:
        """The states `back` layers before the last, (1, S, D) without the final norm, and the pooled text."""
        return self.states(self.tokenize([text]), back, norm=False)

    def states(self, ids: Tensor, back: int = 0, norm: bool = True) -> Conditioning:
        """Token ids (B, S) -> the states `back` layers before the last, through the final norm or not, and pooled."""
        out = self.model(input_ids=sent(ids, self.device), output_hidden_states=back > 0)
        states, pooled = out.last_hidden_state, getattr(out, "text_embeds", None)
        if back:
            tower: Any = getattr(self.model, "text_model", self.model)  # transformers 5: none in CLIPTextModel
            states = tower.final_layer_norm(out.hidden_states[-1 - back]) if norm else out.hidden_states[-1 - back]
        return Conditioning(states, out.pooler_output if pooled is None else pooled)

    def truncated(self, text: str) -> str:
        """The end of the text that does not fit into max_length tokens; "" if all of it does."""
        return str(self.tokenizer.decode(self.token_ids(text)[self.max_length - 2 :])).strip()  # less start and end

    def unknown_words(self, text: str) -> list[str]:
        """Words, each once, that the encoder was never trained on; without a list of its words what is no token."""
        found = spelt(text)
        if self.words is not None:
            counted = any(word.isdigit() for word in self.words)  # older lists leave numbers out
            return [word for word in found if word not in self.words and (counted or not word.isdigit())]
        ends = {self.tokenizer.unk_token, self.tokenizer.eos_token}
        return [word for word in found if any(piece in ends for piece in self.tokenizer.tokenize(word))]
