"""The LoRA or DoRA that a fine-tuning continues: its settings, whether it fits, its updates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ldm.checkpoint import Model
from ldm.checkpoint.lora import LoraHeader, Target, match_layers, read_lora, read_lora_header, target_of
from ldm.config import require
from ldm.console import say
from ldm.errors import ConfigError, ModelError
from ldm.nn.lora import LowRank
from ldm.training.settings import FinetuneSettings


def settings_of_lora(init: str) -> dict[str, Any]:
    """The settings of a run that continues this LoRA: its kind, its commonest rank and alpha, where its layers are.

    Says what had to be assumed. Raises ModelError.
    """
    header = read_lora_header(init)
    if header.assumed:
        say(f"{header.path}: {header.assumed} layers have no alpha; the rank is taken for it")
    entries = list(header.entries.values())
    (rank, alpha), _ = Counter((entry.rank, entry.alpha) for entry in entries).most_common(1)[0]
    text = any(name.startswith(("lora_te", "text_encoder")) for name in header.entries)
    kind = "dora" if header.dora else "lora"
    return {"train": kind, "lora_rank": rank, "lora_alpha": alpha, "targets": [], "text_encoder": text}


def check_given(given: Mapping[str, Any], lora: Mapping[str, Any]) -> None:
    """Raise ConfigError where another kind, rank or other layers are given than those of the LoRA to continue."""
    for name, value in lora.items():
        asked = given.get(name)
        if asked is not None and asked != value:
            what = f"is {value} in the LoRA to continue" if value != [] else "are those of the LoRA to continue"
            raise ConfigError(f"{what}, not {asked}", where=name, hint="leave it out")


def check_init(s: FinetuneSettings, target: Target | None) -> None:
    """Raise ConfigError or ModelError where the LoRA to continue does not fit the settings or the model."""
    header = read_lora_header(s.init)
    kind = "dora" if header.dora else "lora"
    require(s.train == kind, f"the LoRA to continue is a {kind}, and train is {s.train}", "train")
    if target is not None:
        text = any(part != "unet" for part, _ in places_of(header, target).values())
        has = "has layers of the text encoder" if text else "has no layer of the text encoder"
        require(text == s.text_encoder, f"must be {str(text).lower()}: the LoRA to continue {has}", "text_encoder")


def places_of(header: LoraHeader, target: Target) -> Mapping[str, tuple[str, str]]:
    """The part and the layer of each layer of the LoRA to continue (see `fit`).

    Raises ModelError where they do not fit, or could not be written for diffusers.
    """
    places = match_layers(header, target).layers
    kinds = {(part, "magnitude" in header.entries[layer].keys) for layer, (part, _) in places.items()}
    for part in dict.fromkeys(part for part, _ in kinds):
        if {(part, True), (part, False)} <= kinds:
            what = f"has LoRA and DoRA layers in its {part}, which diffusers' files cannot hold"
            raise ModelError(what, where=header.path, hint="continue a file of one kind")
    return places


def continued_updates(settings: FinetuneSettings, model: Model) -> tuple[dict[str, dict[str, LowRank]], dict[str, str]]:
    """The updates of the LoRA to continue, and its sha256."""
    lora = read_lora(settings.init)
    updates: dict[str, dict[str, LowRank]] = {}
    places = places_of(lora.header, target_of(model))
    for layer, (part, name) in places.items():
        updates.setdefault(part, {})[name] = lora.layers[layer]
    return updates, {"init": lora.hash}
