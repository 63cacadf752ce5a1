"""What a text tower learns beside the contrast with images: to name things, to know their order, to stay what it was.

B captions   S tokens   D width of the states
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.data.emoji.labels import Labels, label_sizes, labels_of, mirrored, plain_words
from ldm.evaluation.readers import scores, unseen_captions
from ldm.nn.readers import Readers, reading_loss
from ldm.nn.text import ClipText
from ldm.training.data.samples import EmojiSamples
from ldm.training.loop import seeded
from ldm.training.settings import TextSettings

UNSEEN = 500  # captions of the validation
SAMPLE = 512  # captions whose mean states standardise the readers' input


class Told(NamedTuple):
    """Fresh captions of a step: those of scenes, then pairs with their mirrors."""

    ids: Tensor  # (B, S)
    labels: Tensor  # (B, number of labels)
    rows: Tensor  # (P,) those of single things, which are anchored
    plain: Tensor  # (P, S) the plain words of these


class ReadingTerms:
    """The terms `naming`, `order` and `anchor` of the text stage. `before` is the tower that the run began with."""

    def __init__(self, settings: TextSettings, samples: EmojiSamples, text: ClipText, before: nn.Module | None):
        self.settings, self.scenes, self.text, self.before = settings, samples.scenes, text, before
        self.end = text.tokenizer.eos_token_id

    @torch.no_grad()
    def new_readers(self, tower: nn.Module) -> Readers:
        """Readers of the tower's mean states, standardised by captions of this run where the tower is a trained one."""
        sizes, width = label_sizes()._asdict(), tower.config.hidden_size
        if self.before is None:
            return Readers(sizes, torch.zeros(width), torch.ones(width))
        ids = self.text.tokenize([self.scenes.caption(i) for i in range(SAMPLE)])
        states = torch.cat([states_of(tower, part) for part in ids.split(64)])
        self.scale = float(states.var())
        means = states.mean(1)
        return Readers(sizes, means.mean(0), means.std(0) + 1e-6)

    def batch(self, number: int) -> Told:
        """The captions of micro-batch `number`, a function of it and the settings alone."""
        s = self.settings
        specs = [self.scenes.spec(number * s.named + i) for i in range(s.named)]
        rows = [row for row, spec in enumerate(specs) if spec.kind == "single"]
        captions, plain = [spec.caption for spec in specs], [plain_words(specs[row]) for row in rows]
        if s.anchor:
            for row, words in list(zip(rows, plain))[::2]:  # whose states are held as a whole
                captions[row] = words
        everyday = number < s.everyday_until * s.steps * s.accumulation
        seed, first = seeded.key(s.seed, "pairs"), number * s.mirrored
        pairs = [said for i in range(first, first + s.mirrored) for said in mirrored(seed, i, everyday_only=everyday)]
        labels: list[Labels] = [*map(labels_of, specs), *(labels for _, labels in pairs)]
        ids = self.text.tokenize(captions + [text for text, _ in pairs])
        held = self.text.tokenize(plain) if plain else ids[:0]
        return Told(ids, torch.tensor(labels), torch.tensor(rows, dtype=torch.long), held)

    def loss(self, tower: nn.Module, readers: Readers, told: Told, device: torch.device) -> Tensor:
        """The terms of these captions, weighed."""
        s = self.settings
        ids, labels, rows, plain = (tensor.to(device) for tensor in told)
        states = states_of(tower, ids)
        total = s.naming * reading_loss(readers(states.mean(1)), labels, s.order)
        if s.anchor and len(rows):
            total = total + s.anchor * self._anchor(states[rows], ids[rows], plain)
        return total

    @torch.no_grad()
    def scores(self, tower: nn.Module, readers: Readers, device: torch.device) -> dict[str, float]:
        """The fractions that the readers tell right of captions whose combinations are held out."""
        captions, labels = zip(*unseen_captions(UNSEEN, self.settings.seed))
        parts = self.text.tokenize(list(captions)).to(device).split(64)
        means = torch.cat([states_of(tower, ids).mean(1) for ids in parts])
        return scores(readers, means, torch.tensor(labels, device=device))

    def _anchor(self, states: Tensor, ids: Tensor, plain: Tensor) -> Tensor:
        """How far the states of single things are from what the tower said of their plain words before.

        Those are their means and, place by place, what follows the end of both captions; all of them where the
        words are the plain ones.
        """
        with torch.no_grad():
            was = states_of(self.before, plain)
        gap = (states - was).square().mean(-1)
        same = (ids == plain).all(1)
        after = ((ids == self.end).cumsum(1) > 0) & ((plain == self.end).cumsum(1) > 0)
        found = (states.mean(1) - was.mean(1)).square().mean() + (gap * after).sum() / after.sum().clamp(min=1)
        return (found + (gap * same[:, None]).sum() / (same.sum() * gap.shape[1]).clamp(min=1)) / self.scale


def states_of(tower: nn.Module, ids: Tensor) -> Tensor:
    """Token ids (B, S) -> the states (B, S, D) that a U-Net would attend to."""
    return tower(input_ids=ids).last_hidden_state
