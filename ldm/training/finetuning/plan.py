"""The plan of a fine-tuning, the same for `ldm data check`, `--dry-run` and the run: settings, buckets, steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.config import build
from ldm.errors import ConfigError
from ldm.training.data import ImageSet
from ldm.training.finetuning import presets
from ldm.training.finetuning.continued import check_given
from ldm.training.finetuning.options import nest
from ldm.training.settings import FinetuneData, FinetuneSettings


@dataclass(frozen=True)
class Plan:
    """What is known of a fine-tuning before its images are read; `images` completes it."""

    given: Mapping[str, Any]  # settings that were asked for, by their keys
    settings: Mapping[str, Any]  # with the presets of the model and the hardware
    facts: presets.Facts | None  # None: of a run that is resumed, which keeps its settings
    data: FinetuneData

    def complete(self, images: ImageSet) -> dict[str, Any]:
        """All settings, by their keys: with the presets that depend on the images, epochs as steps."""
        buckets = list(Counter(images.items[place].bucket for place in images.trained).values())
        if self.facts is None:
            return presets.in_steps(self.settings, self.given, buckets)
        return presets.for_images(self.settings, self.given, self.facts, buckets)

    def build(self, settings: Mapping[str, Any]) -> FinetuneSettings:
        """Raises ConfigError."""
        return build(FinetuneSettings, {**nest(settings), "data": self.data})


def make_plan(given: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> Plan:
    """The plan for what is `given`, of a new run or one with the settings `before`. Raises ConfigError, ModelError."""
    settings, facts = {**(before or {}), **given}, None
    if not settings.get("data.folder"):
        raise ConfigError("is needed: a folder of captioned images", where="data")
    if not before:
        facts = presets.read_facts(given)
        if facts.init is not None:
            check_given(given, facts.init)
        settings = presets.for_model(given, facts)
    return Plan(given, settings, facts, build(FinetuneData, nest(settings)["data"], "data"))
