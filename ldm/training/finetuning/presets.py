"""The plan of a fine-tuning, for `ldm data check`, `--dry-run` and the run alike: its settings, and presets for others.

Presets are chosen from the model, the number of images and the hardware.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config import build, require
from ldm.errors import ConfigError
from ldm.training.data import ImageSet
from ldm.training.finetuning.continued import check_given, settings_of_lora
from ldm.training.finetuning.options import KEYS, OPTIONS, SWITCHES, nest
from ldm.training.finetuning.preset_tables import BATCHES, CONTROL, FLOW, LENGTHS, PRESETS, PRIOR, ROOMY, SHARED
from ldm.training.settings import FinetuneData, FinetuneSettings
from ldm.training.settings.features import LORA_ONLY
from ldm.training.settings.finetune_data import FINE_STEP, FINE_UP_TO

# Sizes of models by the width of their U-Net: the default model is small, SD 1.x and 2.x are sd, XL is xl.
SMALL_WIDTH = 256  # channels of the first level, below which a model is small
SMALL_TRANSFORMER = 768  # width below which a flow transformer is small: SD3-medium's is 1536
MAY_BE_NONE = (*SHARED, "timestep_shift")  # whose preset may be another


@dataclass(frozen=True)
class Facts:
    """What is known of model and hardware before a weight or an image is read."""

    width: int  # channels of the U-Net's first level, or of the flow transformer
    xl: bool
    side: int  # pixels that the model draws at
    flow: bool
    device: str  # cpu, cuda, mps
    memory: int | None = None  # bytes of the GPU
    init: Mapping[str, Any] | None = None  # settings that the LoRA to continue has
    default: bool = False  # the model that ships, which can draw what it was trained on
    transformer: bool = False  # a flow transformer in place of a U-Net
    multiple: int = 8  # pixels that divide the sides of images

    @property
    def size(self) -> str:
        if self.transformer:
            return "small" if self.width < SMALL_TRANSFORMER else "flow"
        return "small" if self.width < SMALL_WIDTH else "xl" if self.xl else "sd"


def for_model(given: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """`given` with the presets that depend on the model and the hardware alone."""
    full = _is_whole(given)
    settings = {"data.resolution": facts.side, **given}
    settings |= {name: value for name, value in SHARED.items() if name != "snr_gamma" or not facts.flow}
    settings |= PRESETS[facts.size, full] | (FLOW if facts.transformer else {}) | (facts.init or {})
    if FINE_STEP % facts.multiple and _positive(settings["data.resolution"]) <= FINE_UP_TO:
        settings["data.bucket_step"] = facts.multiple
    control = given.get("control") is not None
    settings |= CONTROL[facts.size] if control else {}
    if facts.default and not control and given.get("prior") is None and given.get("prior_images") != 0:
        settings |= PRIOR if full else PRIOR | {"prior_target": "model"}
    batch_size, accumulation, checkpointing = BATCHES[facts.size, "cpu" if facts.device == "cpu" else "gpu"]
    if facts.memory is not None and facts.memory < ROOMY.get((facts.size, full), 0):
        batch_size, accumulation, checkpointing = 1, batch_size * accumulation, True
    settings |= {"batch_size": batch_size, "accumulation": accumulation}
    settings |= {"gradient_checkpointing": True} if checkpointing else {}
    return settings | given


def for_images(
    settings: Mapping[str, Any], given: Mapping[str, Any], facts: Facts, buckets: Sequence[int]
) -> dict[str, Any]:
    """The `settings` of `for_model` with the presets that depend on the number of images; epochs become steps.

    `buckets` are the samples of an epoch in each bucket: a batch holds images of one bucket alone.
    """
    settings = dict(settings)
    if "batch_size" not in given:
        settings["batch_size"] = max(1, min(settings["batch_size"], sum(buckets)))
    settings = in_steps(settings, given, buckets)
    passes, least, most = LENGTHS[facts.size, _is_whole(settings)]
    settings.setdefault("steps", min(max(round(passes * _epoch(settings, buckets)), least), most))
    steps = _positive(settings["steps"])
    presets = {
        "warmup": min(100, steps // 20),
        "ema": 0.0 if steps < 20 else round(min(0.9995, 1 - 10 / steps), 4),
        "validate_every": max(1, min(1000, steps // 8)),
        "save_every": max(1, min(1000, steps // 8)),
        "log_every": max(1, min(20, steps // 20)),
    }
    return settings | {name: value for name, value in presets.items() if name not in settings}


def _is_whole(settings: Mapping[str, Any]) -> bool:
    """Whether a whole network is trained: the U-Net, or a ControlNet."""
    return settings.get("train") == "full" or settings.get("control") is not None


def in_steps(settings: Mapping[str, Any], given: Mapping[str, Any], buckets: Sequence[int]) -> dict[str, Any]:
    """`settings` with the epochs of `given` as steps. Raises ConfigError."""
    settings = {key: value for key, value in settings.items() if key != "epochs"}
    if given.get("epochs") is not None:
        epochs = given["epochs"]
        require(_positive(epochs) == epochs, f"must be a positive number, got {epochs!r:.80}", "epochs")
        settings["steps"] = max(1, math.ceil(epochs * _epoch(settings, buckets)))
    return settings


def _epoch(settings: Mapping[str, Any], buckets: Sequence[int]) -> float:
    """Steps of an epoch: its batches, of which `accumulation` make one."""
    size = _positive(settings["batch_size"])
    return sum(math.ceil(count / size) for count in buckets) / _positive(settings["accumulation"])


def _positive(value: Any) -> float:
    """The number, or 1 where it is not positive: what is given is refused later, where the settings are built."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    return value if good else 1


def read_facts(given: Mapping[str, Any]) -> Facts:
    """The facts for these settings, from configs and headers alone. Raises ModelError, ConfigError."""
    from ldm.checkpoint.describe import describe
    from ldm.device import pick_device, total_memory

    names = ("model", "vae", "init", "device", "prediction_type")
    model, vae, init, device, prediction_type = (text_of(given, name) for name in names)
    device = pick_device(device or "auto")
    asked = None if prediction_type == "flow" else prediction_type
    info = describe(model or "default", vae, asked, text_encoders=given.get("text_encoders"))
    transformer = info.transformer
    return Facts(
        width=transformer.width if transformer else info.unet.block_out_channels[0],
        xl=info.unet.takes_sizes,
        side=info.usual_side,
        flow=info.schedule.is_flow,
        device=device.type,
        memory=total_memory(device) if device.type == "cuda" else None,
        default=model in (None, "default"),
        init=None if init is None else settings_of_lora(init),
        transformer=transformer is not None,
        multiple=info.multiple,
    )


def text_of(settings: Mapping[str, Any], name: str) -> str | None:
    """A setting that is a text or not given. Raises ConfigError."""
    value = settings.get(name)
    require(isinstance(value, str | None), f"expected str, got {value!r:.80}", name)
    return value


@dataclass(frozen=True)
class Plan:
    """What is known of a fine-tuning before its images are read; `images` completes it."""

    given: Mapping[str, Any]  # settings that were asked for, by their keys
    settings: Mapping[str, Any]  # with the presets of the model and the hardware
    facts: Facts | None  # None: of a run that is resumed, which keeps its settings
    data: FinetuneData

    def complete(self, images: ImageSet) -> dict[str, Any]:
        """All settings, by their keys: with the presets that depend on the images, epochs as steps."""
        buckets = list(Counter(images.items[place].bucket for place in images.trained).values())
        if self.facts is None:
            return in_steps(self.settings, self.given, buckets)
        return for_images(self.settings, self.given, self.facts, buckets)

    def build(self, settings: Mapping[str, Any]) -> FinetuneSettings:
        """Raises ConfigError."""
        return build(FinetuneSettings, {**nest(settings), "data": self.data})


def make_plan(given: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> Plan:
    """The plan for what is `given`, of a new run or one with the settings `before`. Raises ConfigError, ModelError."""
    settings, facts = {**(before or {}), **given}, None
    if not settings.get("data.folder"):
        raise ConfigError("is needed: a folder of captioned images", where="data")
    if not before:
        facts = read_facts(given)
        if facts.init is not None:
            check_given(given, facts.init)
        settings = for_model(given, facts)
    return Plan(given, settings, facts, build(FinetuneData, nest(settings)["data"], "data"))


def command(settings: Mapping[str, Any], out: str | Path) -> str:
    """The command line that gives exactly these settings, presets included."""
    options = {name for group in OPTIONS.values() for name in group}
    names = {KEYS[name]: name for name in KEYS if name in options and name not in ("epochs", "prompts_file")}
    parts = ["ldm", "finetune", str(settings.get("data.folder", "DATA")), "-o", str(out)]
    for key, value in settings.items():
        option = f"--{names[key].replace('_', '-')}" if key in names else ""
        if key in ("data.folder", "stage") or (value == [] and key != "report_to"):
            continue
        if value is None and key not in MAY_BE_NONE:
            continue  # as where it is not given
        if key in LORA_ONLY and _is_whole(settings):
            continue
        if key in ("validation_prompts", "text_encoders"):
            for text in value:
                parts += _with_value(option, str(text))
        elif names.get(key) in SWITCHES:
            parts += [option] if value is True else [f"{key}={_shown(value)}"]
        elif option:
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else _shown(value)
            parts += _with_value(option, text)
        else:
            parts.append(f"{key}={_shown(value)}")
    return " ".join(shlex.quote(part) for part in parts)


def _with_value(option: str, text: str) -> list[str]:
    return [f"{option}={text}"] if text.startswith("-") or not text else [option, text]


def _shown(value: Any) -> str:
    if type(value) is not float:
        return value if isinstance(value, str) else json.dumps(value)
    return short if float(short := f"{value:g}") == value else repr(value)
