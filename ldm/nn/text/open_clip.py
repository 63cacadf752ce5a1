"""open_clip's own text tower (Ilharco et al. 2021), without a conversion to transformers' names.

Shapes:  B texts   S tokens   D width of the states   P width of the projected text
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldm.errors import ModelError
from ldm.nn.text.conditioning import Conditioning, InChunks, OneNetwork, check_skip, one_by_one

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transformer import TextTransformer


class OpenClipText(OneNetwork, InChunks):
    """A TextTransformer of open_clip with its tokenizer: the same states as the text encoders that are made from it.

    `left_out` layers at the end are not computed for the states: 1 for Stable Diffusion 2.x; as the second encoder of
    XLText it does not matter, which takes the last layer but one by itself. Its tokenizer tells "!" from padding and
    reads "&amp;" as "&"; transformers' tokenizers that pad with "!" do neither. Raises ModelError for a tower of
    another kind: not causal, with a class token, or pooled elsewhere than at the end of the text.
    """

    model: TextTransformer

    def __init__(self, model: TextTransformer, tokenizer: SimpleTokenizer, left_out: int = 1):
        self.model, self.tokenizer, self.left_out = model, tokenizer, left_out
        self.width: int = model.width
        self.max_length: int = model.context_length
        self.projects: bool = isinstance(model.text_projection, nn.Parameter)
        if model.cls_emb is not None or model.attn_mask is None or model.pool_type != "argmax":
            raise ModelError("this text tower of open_clip is not causal, or not pooled at the end of the text")
        if tokenizer.vocab_size != model.vocab_size:
            sizes = f"{tokenizer.vocab_size} tokens, the text encoder {model.vocab_size}"
            raise ModelError(f"the tokenizer has {sizes}")

    @torch.no_grad()
    def encode(self, texts: Sequence[str | None], clip_skip: int = 0) -> Conditioning:
        """States (B, S, D) through the final norm, and those of the texts' ends (B, D); None is the empty text.

        Each distinct text is encoded alone, so that its bits do not depend on the others. clip_skip leaves out so many
        layers more. Raises ConfigError for an impossible one.
        """
        self.check_skip(clip_skip)
        return one_by_one([text or "" for text in texts], lambda text: self.states(self.tokenize([text]), clip_skip))

    @torch.no_grad()
    def encode_together(self, texts: list[str]) -> Conditioning:
        """As `encode`, in batches of 64: faster, but a text's bits depend on the batch that it is in."""
        return Conditioning.cat(self.states(ids) for ids in self.tokenize(texts).split(64))

    @property
    def clip_layers(self) -> tuple[int, ...]:
        """How many layers the encoder has, less those that are left out."""
        return (len(self.model.transformer.resblocks) - self.left_out,)

    def check_skip(self, clip_skip: int) -> None:
        """Raise ConfigError where no layer would be left."""
        check_skip(clip_skip, *self.clip_layers)

    def without_norm(self, text: str, back: int) -> Conditioning:
        """The states `back` layers before the last, (1, S, D) without the final norm, and the projected text (1, P)."""
        return self.states(self.tokenize([text]), back, norm=False)

    def states(self, ids: Tensor, back: int = 0, norm: bool = True) -> Conditioning:
        """Token ids (B, S) -> as `encode` with `back` as clip_skip, or with `norm` False as `without_norm`."""
        hidden = self._hidden(ids)
        if not norm:
            pooled = self._ends(ids, self.model.ln_final(hidden[-1])) @ self.model.text_projection
            return Conditioning(hidden[-1 - back], pooled)
        last, taken = (self.model.ln_final(hidden[-1 - self.left_out - skip]) for skip in (0, back))
        return Conditioning(taken, self._ends(ids, last))

    def token_ids(self, text: str) -> list[int]:
        """All of a text's tokens, without start and end."""
        return self.tokenizer.encode(text)

    def with_special_tokens(self, tokens: list[int]) -> Tensor:
        """Token ids (1, S), S = max_length, of at most S - 2 tokens: with start and end, padded."""
        ids = [self.tokenizer.sot_token_id, *tokens, self.tokenizer.eot_token_id]
        return torch.tensor([ids + [0] * (self.max_length - len(ids))], device=self.device)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token ids (B, S), S = max_length: cut or padded."""
        return self.tokenizer(texts, context_length=self.max_length).to(self.device)

    def _hidden(self, ids: Tensor) -> list[Tensor]:
        """What comes out of the embedding and of every layer, (B, S, D) each."""
        hidden = [self.model.token_embedding(ids) + self.model.positional_embedding]
        for block in self.model.transformer.resblocks:
            hidden.append(block(hidden[-1], attn_mask=self.model.attn_mask))
        return hidden

    def _ends(self, ids: Tensor, states: Tensor) -> Tensor:
        return states[torch.arange(len(ids), device=ids.device), ids.argmax(-1)]  # the end has the highest id

    def truncated(self, text: str) -> str:
        """The end of the text that does not fit into max_length tokens; "" if all of it does."""
        return self.tokenizer.decode(self.token_ids(text)[self.max_length - 2 :]).strip()

    def unknown_words(self, text: str) -> list[str]:
        """None: the tokenizer spells every word, and nothing is known of those that it was trained on."""
        return []
