"""Stage 2, the text tower: a small CLIP trained by contrast with an image tower on the autoencoder's latents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoint.parts import load_text_from, model_folder, save_parts
from ldm.config import require
from ldm.device import pick_device
from ldm.nn.clip import SmallClip, recall_at_1, train_tokenizer
from ldm.nn.text import ClipText, known_words
from ldm.training.checks import check_same
from ldm.training.data import Batch, ImageDataset, ImageSet, PreparedSet, SceneSet
from ldm.training.data.encoded import Encoders
from ldm.training.loop import seeded
from ldm.training.parts import vae_part
from ldm.training.settings import TextSettings
from ldm.training.stages.text_terms import ReadingTerms


def open_stage(settings: TextSettings, out: Path, images: ImageSet | PreparedSet | SceneSet) -> Text:
    return Text(settings, out, images)


class Text:
    """Captions against latents, and what they say; the tokenizer is trained first, on captions alone."""

    def __init__(self, settings: TextSettings, out: Path, images: ImageSet | PreparedSet | SceneSet):
        s = self.settings = settings
        self.device = pick_device(s.device)
        vae = vae_part(s)
        self.vae = vae.load().to(self.device)
        encoders = Encoders(self.vae, None, (vae.fingerprint, ""), self.device)
        self.data = ImageDataset(images, encoders, s.seed, s.batch_size, out, texts=False)
        self.lines = self.data.lines
        captions = list(self.data.captions(s.tokenizer_captions))
        self.text = self._started() if s.init else None
        self.tokenizer = self.text.tokenizer if self.text else train_tokenizer(captions, s.vocabulary, s.max_length)
        self.max_length = self.text.max_length if self.text else s.max_length
        self.words = known_words(captions)
        if self.text and self.text.words is not None:
            self.words |= self.text.words
        entries = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        # the tokenizer is trained anew where a run resumes
        self.inputs = {**self.data.inputs, "tokenizer": hashlib.sha256(entries.encode()).hexdigest()}
        torch.manual_seed(seeded.key(s.seed, "text"))
        self.module = SmallClip(self._text_config(), self._image_config())
        if self.text:
            self._load(self.text)
        self.terms = self._terms(images) if s.naming and isinstance(images, SceneSet) else None
        found = {text: z for batch in self.data.held_out() for text, z in zip(batch.captions, batch.latents) if text}
        self.validation = (self._tokens(list(found)), torch.stack(list(found.values()))) if found else None

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

    def _terms(self, scenes: SceneSet) -> ReadingTerms:
        """The terms beside the contrast; their readers become a part of the module."""
        before = self.text.model.to(self.device).requires_grad_(False) if self.text else None
        text = ClipText(self.module.text, self.tokenizer, self.words)
        terms = ReadingTerms(self.settings, scenes.samples(), text, before)
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

    def batches(self, first_step: int) -> Iterator[Batch]:
        s = self.settings
        return self.data.batches(first_step, s.steps, s.accumulation)

    def _trimmed(self, tokens: Tensor) -> Tensor:
        """Without the columns in which every row is past its end: attention is causal, so no state changes."""
        ends = (tokens == self.tokenizer.eos_token_id).int().argmax(1)
        return tokens[:, : int(ends.max()) + 1]

    def loss(self, batch: Batch, step: int, micro: int) -> Tensor:
        s, loss = self.settings, batch.latents.new_zeros(())
        if s.contrast:
            loss = batch.weight * s.contrast * self.module(self._trimmed(self._tokens(batch.captions)), batch.latents)
        if self.terms:
            told = self.terms.batch(step * s.accumulation + micro)
            loss = loss + self.terms.loss(self.module.text, self.module.readers, told, self.device)
        return loss

    @torch.no_grad()
    def validate(self, ema: nn.Module, step: int) -> dict[str, float]:
        """R@1 among held-out samples with distinct captions, and how often a synonym is nearest to its own object."""
        if self.validation is None:
            return {}
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
