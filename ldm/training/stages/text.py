"""Stage 2, the text tower: a small CLIP trained by contrast with an image tower on the autoencoder's latents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.checkpoint.parts import load_text_from, model_folder, save_parts
from ldm.config import require
from ldm.device import pick_device
from ldm.nn.clip import SmallClip, recall_at_1, train_tokenizer
from ldm.nn.text import ClipText, known_words
from ldm.training.checks import check_same
from ldm.training.data.latent_pool import LatentPool, encode_images
from ldm.training.data.samples import open_samples
from ldm.training.loop import seeded
from ldm.training.parts import vae_part
from ldm.training.settings import TextSettings
from ldm.training.stages.start import SEED_OFFSET, distinct
from ldm.training.stages.text_terms import ReadingTerms, Told


class TextBatch(NamedTuple):
    """Rows of the pool, and captions with what they say."""

    tokens: Tensor  # (B, S)
    latents: Tensor  # (B, C, h, w)
    told: Told | None


def open_stage(settings: TextSettings, out: Path, images: object) -> Text:
    return Text(settings)


class Text:
    """Captions against latents, and what they say; the tokenizer is trained first, on captions alone."""

    def __init__(self, settings: TextSettings):
        s = self.settings = settings
        self.device = pick_device(s.device)
        self.samples = open_samples(s.data, s.seed)
        self.vae = vae_part(s).load()
        self.vae.module.to(self.device)
        captions = self.samples.captions(0, s.tokenizer_captions)
        self.text = self._started() if s.init else None
        self.tokenizer = self.text.tokenizer if self.text else train_tokenizer(captions, s.vocabulary, s.max_length)
        self.max_length = self.text.max_length if self.text else s.max_length
        self.words = known_words(captions)
        if self.text and self.text.words is not None:
            self.words |= self.text.words
        entries = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        self.inputs = {"tokenizer": hashlib.sha256(entries.encode()).hexdigest()}  # trained anew where a run resumes
        torch.manual_seed(seeded.key(s.seed, "text"))
        self.module = SmallClip(self._text_config(), self._image_config())
        if self.text:
            self._load(self.text)
        self.terms = self._terms() if s.naming and not s.data.folder else None
        held_out = open_samples(s.data, s.seed + SEED_OFFSET, held_out=True)
        found = distinct(held_out, s.validation)
        images = torch.stack([torch.from_numpy(held_out[i][0]) for i in found.values()])
        self.validation = (self._tokens(list(found)), self._latents(images))

    def _started(self) -> ClipText:
        """The text encoder of `init`. Raises ConfigError or ModelError where it is not what the settings ask for."""
        text = load_text_from(model_folder(self.settings.init))
        require(isinstance(text, ClipText), f"is a {type(text).__name__}: this stage trains CLIP", "init")
        check_same(self.settings.model, text.model.config.to_dict(), self.settings.init)
        return text

    def _load(self, text: ClipText) -> None:
        """Take over the weights of a text encoder; the projection that the contrast needs is new."""
        own, given = self.module.text.state_dict(), text.model.state_dict()
        bare = {name.removeprefix("text_model."): value for name, value in given.items()}
        found = {
            name: bare[name.removeprefix("text_model.")] for name in own if not name.startswith("text_projection.")
        }
        self.module.text.load_state_dict(found, strict=False)

    def _terms(self) -> ReadingTerms:
        """The terms beside the contrast; their readers become a part of the module."""
        before = self.text.model.to(self.device).requires_grad_(False) if self.text else None
        text = ClipText(self.module.text, self.tokenizer, self.words)
        terms = ReadingTerms(self.settings, self.samples, text, before)
        self.module.readers = terms.new_readers(self.module.text)
        return terms

    def _text_config(self) -> dict:
        if self.text:
            return self.text.model.config.to_dict()
        t = self.tokenizer
        ids = {"bos_token_id": t.bos_token_id, "eos_token_id": t.eos_token_id, "pad_token_id": t.pad_token_id}
        sizes = {"vocab_size": len(t), "max_position_embeddings": self.settings.max_length}
        return {**self.settings.model, **sizes, **ids}  # without eos_token_id transformers pools position 0

    def _image_config(self) -> dict:
        size = self.settings.data.resolution // self.vae.factor
        return {**self.settings.image_tower, "num_channels": self.vae.latent_channels, "image_size": size}

    def _tokens(self, captions: list[str]) -> Tensor:
        rows = self.tokenizer(captions, padding="max_length", truncation=True, max_length=self.max_length)
        return torch.tensor(rows["input_ids"]).to(self.device)

    def _latents(self, images: Tensor) -> Tensor:
        return encode_images(self.vae, images, self.device)

    def batches(self, first_step: int) -> Iterator[TextBatch]:
        s = self.settings
        pool = LatentPool(self.samples, self._latents, self._tokens, s.latent_pool, s.renew, s.workers, first_step)
        for number in range(first_step * s.accumulation, s.steps * s.accumulation):
            step, micro = divmod(number, s.accumulation)
            rows = seeded.integers(s.latent_pool, (s.batch_size,), s.seed, "rows", step, micro)
            pool.at(step)
            told = self.terms.batch(number) if self.terms else None
            yield TextBatch(self._trimmed(pool.texts[rows]), pool.latents[rows], told)

    def _trimmed(self, tokens: Tensor) -> Tensor:
        """Without the columns in which every row is past its end: attention is causal, so no state changes."""
        ends = (tokens == self.tokenizer.eos_token_id).int().argmax(1)
        return tokens[:, : int(ends.max()) + 1]

    def loss(self, batch: TextBatch, step: int, micro: int) -> Tensor:
        contrast = self.settings.contrast
        loss = contrast * self.module(batch.tokens, batch.latents) if contrast else batch.latents.new_zeros(())
        if self.terms:
            loss = loss + self.terms.loss(self.module.text, self.module.readers, batch.told, self.device)
        return loss

    @torch.no_grad()
    def validate(self, ema: nn.Module, step: int) -> dict[str, float]:
        """R@1 among held-out samples with distinct captions, and how often a synonym is nearest to its own object."""
        tokens, latents = self.validation
        forward, backward = recall_at_1(ema.embed_text(tokens), ema.embed_image(latents))
        scores = {"text_to_image": forward, "image_to_text": backward}
        if self.terms:
            scores |= self.terms.scores(ema.text, ema.readers, self.device)
        return scores if self.settings.data.folder else {**scores, "synonyms": self._synonyms(ema)}

    def _synonyms(self, ema: nn.Module) -> float:
        from ldm.data.emoji import objects

        things = objects()
        names = torch.cat([ema.embed_text(self._tokens([f"a {t.word}" for t in part])) for part in _parts(things)])
        right, total = 0, 0
        for part in _parts([(i, w) for i, t in enumerate(things) for w in t.words if w != t.word]):
            nearest = (ema.embed_text(self._tokens([f"a {word}" for _, word in part])) @ names.T).argmax(1).tolist()
            right += sum(things[n].lookalike_class == things[i].lookalike_class for n, (i, _) in zip(nearest, part))
            total += len(part)
        return right / max(1, total)

    def sample_grid(self, ema: nn.Module) -> None:
        return None

    def export(self, ema: nn.Module, folder: Path, scores: dict[str, float]) -> Path:
        from transformers import CLIPTextModel

        tower = CLIPTextModel(ema.text.config)
        state = {k: v for k, v in ema.text.state_dict().items() if not k.startswith("text_projection.")}
        bare = {k.removeprefix("text_model."): v for k, v in state.items()}
        tower.load_state_dict({k: bare[k.removeprefix("text_model.")] for k in tower.state_dict()}, strict=True)
        return save_parts(folder, torch.bfloat16, text=ClipText(tower, self.tokenizer, self.words))


def _parts(items, size: int = 256) -> list:
    return [items[i : i + size] for i in range(0, len(items), size)]
