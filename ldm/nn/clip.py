"""A small CLIP to train from nothing: a text tower, an image tower on latents, and their contrast.

B batch   S tokens   P width of the common space   C, H, W latent channels, height, width
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What both towers have unless told otherwise.
TEXT = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 6}
IMAGE = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "patch_size": 2,
}
PROJECTION = 128


class SmallClip(nn.Module):
    """transformers' two CLIP towers with one temperature; the text tower alone is what a diffusion model keeps."""

    def __init__(self, text: dict, image: dict):
        from transformers import (
            CLIPTextConfig,
            CLIPTextModelWithProjection,
            CLIPVisionConfig,
            CLIPVisionModelWithProjection,
        )

        super().__init__()
        common = {"projection_dim": PROJECTION}
        self.text = CLIPTextModelWithProjection(CLIPTextConfig(**{**TEXT, **text, **common}))
        self.image = CLIPVisionModelWithProjection(CLIPVisionConfig(**{**IMAGE, **image, **common}))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_text(self, tokens: Tensor) -> Tensor:
        """(B, S) → unit vectors (B, P)."""
        return F.normalize(self.text(input_ids=tokens).text_embeds.float(), dim=-1)

    def embed_image(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) → unit vectors (B, P)."""
        return F.normalize(self.image(pixel_values=latents).image_embeds.float(), dim=-1)

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """The loss of a batch of pairs."""
        scale = self.logit_scale.clamp(max=math.log(100)).exp()
        return contrastive_loss(self.embed_text(tokens), self.embed_image(latents), scale, same_rows(tokens))


def same_rows(tokens: Tensor) -> Tensor:
    """(B, S) → (B, B) bool: which rows hold the same text."""
    return (tokens[:, None] == tokens[None]).all(-1)


def contrastive_loss(text: Tensor, image: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Symmetric cross entropy over a batch (Radford et al. 2021, figure 3); equal texts are no negatives of each other.

    text, image: (B, P) unit vectors; same: (B, B) bool, True on the diagonal.
    """
    logits = scale * text @ image.T  # (B, B)
    others = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    logits = logits.masked_fill(others, -math.inf)
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def recall_at_1(text: Tensor, image: Tensor) -> tuple[float, float]:
    """(text finds its image, image finds its text) as fractions, among the rows given: (N, P) unit vectors each."""
    similarity, right = text @ image.T, torch.arange(len(text), device=text.device)
    return (
        (similarity.argmax(1) == right).float().mean().item(),
        (similarity.argmax(0) == right).float().mean().item(),
    )


def train_tokenizer(captions: list[str], vocabulary: int, max_length: int):
    """A CLIP tokenizer (byte-level BPE, lower case, `</w>` at word ends), at most `vocabulary` entries."""
    import json
    import tempfile
    from pathlib import Path

    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    bpe = Tokenizer(models.BPE(unk_token=end, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    last = [f"{letter}</w>" for letter in letters]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        special_tokens=last,  # numbered first: else in the order of a hash table, by which equal counts are then broken
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    words = [*letters, *last]
    words += [w for w in (pair.replace(" ", "") for pair in merges) if w not in set(words)]
    vocab = {word: number for number, word in enumerate(dict.fromkeys([*words, start, end]))}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=max_length)
