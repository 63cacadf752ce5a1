"""LoRAs, from `lora=` and tags in prompts: checked before any weight is read, then merged."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import console
from ldm.errors import ConfigError
from ldm.prompts import has_tags, take_loras

if TYPE_CHECKING:
    from ldm.checkpoint import Model
    from ldm.checkpoint.describe import ModelInfo
    from ldm.checkpoint.few_steps import Sampling


DORA_SCALINGS = ("linear", "peft")


@dataclass(frozen=True)
class Adapter:
    path: Path  # a LoRA file, or a folder with one
    weight: float
    text_weight: float | None = None  # of the text encoder, where it has its own

    @property
    def weights(self) -> tuple[float, float]:
        """(of the text encoder, of the U-Net)"""
        return (self.weight if self.text_weight is None else self.text_weight), self.weight

    def as_list(self) -> list[Any]:
        """[path, weight], and the text encoder's where that is another, as `check_lora` reads it."""
        return [str(self.path), self.weight, *([] if self.text_weight is None else [self.text_weight])]


@dataclass
class Adapters:
    """LoRAs at work: fitted to a model before any weight is read, then merged into it; the model used last is kept."""

    _allow: bool  # whether keys that fit nowhere are a warning instead of an error
    _dora: str = "linear"  # how weights act on a DoRA: see ldm.nn.lora.merged
    _fitted: set[Path] = field(default_factory=set)
    _last: tuple[Model, tuple[Adapter, ...], Model] | None = None

    def check(
        self, adapters: Iterable[Adapter], model: Any, prediction_type: str | None = None, text_encoders: Any = None
    ) -> None:
        """Read the header of each file and fit it to `model`, where that is at hand. Raises ModelError in one line.

        Says, once a file, where alpha is taken to be the rank, which keys are left out, and what it wants to be drawn
        with where it was made for few steps.
        """
        from ldm.checkpoint.few_steps import of_lora
        from ldm.checkpoint.lora import match_layers, read_lora_header, target_at, unapplied_line

        headers = [read_lora_header(path) for path in dict.fromkeys(adapter.path for adapter in adapters)]
        target = target_at(model, prediction_type, text_encoders) if headers else None
        for header in headers:
            found = match_layers(header, target, self._allow) if target else None
            self._fitted |= {header.path} if found else set()
            if header.by_metadata:
                console.say(f"{header.path}: alpha of {header.by_metadata} layers is the header's ss_network_alpha")
            if header.assumed:
                console.say(f"{header.path}: {header.assumed} layers tell no alpha; it is taken to be the rank")
            if found and found.unapplied:
                console.warn(unapplied_line(header, found))
            few = of_lora(header)
            if few and few.doubtful:
                console.warn(few.line)
            elif few:
                console.say(few.line)

    def model(self, base: Model, adapters: tuple[Adapter, ...]) -> Model:
        """`base` with these merged into a copy. Raises ModelError."""
        if self._last is None or self._last[0] is not base or self._last[1] != adapters:
            self._last = None  # its memory goes before the next one's comes
            self._last = (base, adapters, self._merged(base, adapters))
        return self._last[2]

    def _merged(self, base: Model, adapters: tuple[Adapter, ...]) -> Model:
        from ldm.checkpoint.lora import match_layers, read_lora, target_of, unapplied_line, with_loras

        loras = [(read_lora(adapter.path), adapter.weights) for adapter in adapters]
        for lora, _ in loras:
            if lora.header.path in self._fitted:
                continue
            found = match_layers(lora.header, target_of(base), self._allow)  # its shapes could not be had before
            self._fitted.add(lora.header.path)
            if found.unapplied:
                console.warn(unapplied_line(lora.header, found))
        return with_loras(base, loras, self._allow, self._dora)


def few_steps_of(adapters: Iterable[Adapter]) -> Sampling | None:
    """The settings that the first few-step LoRA among these was made for. Raises ModelError as reading does."""
    found = (_few_steps_at(adapter.path, _stamp(adapter.path)) for adapter in adapters if any(adapter.weights))
    return next(filter(None, found), None)


@functools.lru_cache(maxsize=64)
def _few_steps_at(path: Path, stamp: tuple[int, ...]) -> Sampling | None:
    """`stamp` changes with the file."""
    from ldm.checkpoint.few_steps import of_lora
    from ldm.checkpoint.lora import read_lora_header

    found = of_lora(read_lora_header(path))
    return None if found is None else found.sampling


def _stamp(path: Path) -> tuple[int, ...]:
    """Time and size of a LoRA's file; () where there is none, which reading it tells."""
    from ldm.checkpoint.lora.read import lora_path

    try:
        stat = lora_path(path).stat()
    except OSError:
        return ()
    return stat.st_mtime_ns, stat.st_size


def with_few_steps(info: ModelInfo, sets: Sequence[tuple[Adapter, ...]]) -> ModelInfo:
    """`info` with the settings of a few-step LoRA as the model's own, where each image of a call has one of the kind.

    Warns where only some have: a call's settings are shared.
    """
    found = [few_steps_of(adapters) for adapters in sets]
    few = found[0]
    if any(other != few for other in found):
        console.warn("not all prompts have the same few-step LoRA: the model's own settings are used; draw them apart")
        return info
    return info if few is None else dataclasses.replace(info, few=few, card=_card_with(info, few))


def _card_with(info: ModelInfo, few: Sampling) -> dict[str, Any]:
    defaults = few.defaults
    if info.schedule.is_flow:
        defaults.pop("spacing", None)  # flow has its own
    return {**info.card, **defaults}


def take_adapters(
    prompts: Sequence[str], negatives: Sequence[str | None], lora: Any, lora_dir: Any
) -> tuple[tuple[str, ...], tuple[Adapter, ...], tuple[tuple[Adapter, ...], ...]]:
    """(the prompts without their tags, the LoRAs of `lora`, all of each prompt). Raises ConfigError; opens no file."""
    from ldm.checkpoint.lora import find_lora

    if lora_dir is not None and not isinstance(lora_dir, (str, os.PathLike)):
        raise ConfigError(f"expected a folder, got {lora_dir!r:.80}", where="lora_dir")
    if any(has_tags(text or "") for text in negatives):
        raise ConfigError("a <lora:…> tag belongs into the prompt", where="negative_prompt")
    everywhere, texts, sets = check_lora(lora), [], []
    for i, prompt in enumerate(prompts):
        text, tags = take_loras(prompt, where=f"prompt[{i}]" if len(prompts) > 1 else "prompt")
        if tags and lora_dir is None:
            hint = "give lora_dir (--lora-dir), or lora (--lora)"
            raise ConfigError(
                f"<lora:{tags[0].name}> names a LoRA, but no folder to look in", where="prompt", hint=hint
            )
        texts.append(text)
        own = [] if lora_dir is None else [Adapter(find_lora(t.name, lora_dir), t.weight, t.text_weight) for t in tags]
        sets.append((*everywhere, *own))
    return tuple(texts), everywhere, tuple(sets)


def check_lora(value: Any) -> tuple[Adapter, ...]:
    """A path, (path, weight), (path, weight, weight of the text encoder), or a list of these. Raises ConfigError."""
    if value is None:
        return ()
    one = isinstance(value, tuple) and len(value) in (2, 3) and all(map(_number, value[1:]))
    if isinstance(value, (str, os.PathLike)) or one:
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"expected a path, (path, weight) or a list of them, got {value!r:.80}", where="lora")
    return tuple(_adapter(item) for item in value)


def _adapter(item: Any) -> Adapter:
    path, *weights = item if isinstance(item, (tuple, list)) and len(item) in (2, 3) else (item, 1.0)
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ConfigError(f"expected a path, or (path, weight), got {item!r:.80}", where="lora")
    for weight in weights:
        if not _number(weight) or not math.isfinite(weight):
            raise ConfigError(f"the weight of {path} is not a finite number: {weight!r:.80}", where="lora")
    weight, text_weight = float(weights[0]), float(weights[-1])
    return Adapter(Path(os.path.expanduser(path)), weight, None if text_weight == weight else text_weight)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
