"""`fast=True`: the shipped few-step LoRA of the default model, or one line that says why there is none."""

from __future__ import annotations

from typing import Any

from ldm.checkpoint import shipped
from ldm.checkpoint.describe import describe
from ldm.checkpoint.few_steps import MODEL_KEY
from ldm.checkpoint.lora import read_lora_header
from ldm.checkpoint.lora.read import FILE
from ldm.errors import ConfigError, ModelError
from ldm.pipeline.adapters import Adapter, few_steps_of

AGAIN = "make it: ldm distill -o RUN --config emoji/fast (docs/finetune.md), or leave fast out"


def fast_adapter(model: Any, vae: Any) -> Adapter:
    """The few-step LoRA in `weights/fast`. Raises ConfigError for another model, ModelError where it is not there."""
    if model != "default" or vae is not None:
        which = (
            "another vae is given" if model == "default" else f"the model is {getattr(model, 'name', None) or model}"
        )
        hint = "leave fast out, or give a few-step LoRA of that model by lora"
        raise ConfigError(f"is for the default model, and {which}", where="fast", hint=hint)
    path = shipped("weights") / "fast" / FILE
    if not path.is_file():
        raise ModelError("this installation has no few-step LoRA for the default model", where=path, hint=AGAIN)
    header = read_lora_header(path)
    made_for = header.metadata.get(MODEL_KEY)
    if made_for and made_for != describe("default", hashed=True).hash:
        raise ModelError("was distilled from another default model than the one that is here", where=path, hint=AGAIN)
    return Adapter(path, 1.0)


def check_beside(adapters: tuple[tuple[Adapter, ...], ...]) -> None:
    """Raise ConfigError where one of the user's LoRAs, for each prompt, is a few-step LoRA itself."""
    for own in adapters:
        for adapter in own:
            if few_steps_of([adapter]) is not None:
                what = f"{adapter.path.name} is a few-step LoRA itself"
                raise ConfigError(what, where="fast", hint="leave fast out, or that LoRA")
