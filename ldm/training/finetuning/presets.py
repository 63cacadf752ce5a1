"""What a fine-tuning is told where nobody says it: from the model, the number of pictures and the hardware."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config import require
from ldm.console import say
from ldm.training.finetuning.options import KEYS, OPTIONS, SWITCHES

# Sizes of models by the width of their U-Net: the default model is small, SD 1.x and 2.x are sd, XL is xl.
SMALL_WIDTH = 256  # channels of the first level, below which a model is small
# (size, full or not): passes over the pictures, and between how many steps and how many.
LENGTHS = {
    ("small", False): (200, 400, 4000),
    ("small", True): (300, 400, 8000),
    ("sd", False): (100, 400, 3000),
    ("sd", True): (50, 400, 10_000),
    ("xl", False): (80, 400, 3000),
    ("xl", True): (40, 400, 10_000),
}
# A small model keeps shapes in its convolutions, and finds them at high noise, which min-SNR takes weight from: after
# 800 steps on 24 pictures of a new thing, 19 of 20 prompts were right, and 3 of 20 without all this.
SHAPES: dict[str, Any] = {"timesteps": "logit_normal", "timestep_shift": 2.0, "snr_gamma": None}
PRESETS: dict[tuple[str, bool], dict[str, Any]] = {
    ("small", False): {"learning_rate": 1.2e-3, "lora_rank": 32, "targets": ["all"], **SHAPES},
    ("small", True): {"learning_rate": 2e-4, **SHAPES},
    ("sd", False): {"learning_rate": 1e-4, "lora_rank": 16, "targets": ["attention"]},
    ("sd", True): {"learning_rate": 1e-5},
    ("xl", False): {"learning_rate": 1e-4, "lora_rank": 16, "targets": ["attention"]},
    ("xl", True): {"learning_rate": 1e-5},
}
# (size, device): micro-batch, accumulation, gradient checkpointing; on a GPU with its memory in GB.
BATCHES = {
    ("small", "cpu"): (4, 1, False),
    ("small", "gpu"): (16, 1, False),
    ("sd", "cpu"): (1, 4, False),
    ("sd", "gpu"): (4, 1, False),
    ("xl", "cpu"): (1, 4, True),
    ("xl", "gpu"): (1, 4, True),
}
ROOMY = {"sd": 16e9, "xl": 40e9}  # bytes of a GPU from which on the batch above fits without checkpointing
OF_LORA = ("lora_rank", "lora_alpha", "targets", "init")  # words of no meaning in a full run
SHARED = {"snr_gamma": 5.0, "lr_schedule": "cosine"}
# Of the default model, which else forgets what it knew: the new pictures must not become what it draws unasked. Of 50
# old prompts that were right, none were still right after a new thing without a prior, 45 with drawn pictures as the
# target, and 49 with what the model answered on them.
PRIOR = {"prior_images": 320, "prior_weight": 3.0, "data.caption_dropout": 0.0}


@dataclass(frozen=True)
class Facts:
    """What is known before a weight is read or a picture opened."""

    width: int  # channels of the U-Net's first level
    xl: bool
    side: int  # pixels that the model draws at
    flow: bool
    device: str  # cpu, cuda, mps
    memory: int | None = None  # bytes of the GPU
    init: Mapping[str, Any] | None = None  # settings that the LoRA to go on from has
    default: bool = False  # the model that ships, which can be asked for what it knows

    @property
    def size(self) -> str:
        return "small" if self.width < SMALL_WIDTH else "xl" if self.xl else "sd"


def complete(given: Mapping[str, Any], facts: Facts, groups: Sequence[int]) -> dict[str, Any]:
    """`given` (by the settings' keys) with all that a run needs and nobody said.

    `groups` are the samples of an epoch in each bucket: a batch holds pictures of one bucket alone.

    Epochs become steps. The order of keys is that of the table's, so that the printed command is stable.
    """
    full = given.get("train") == "full"
    size = facts.size
    found = before_data(given, facts)
    found |= {name: value for name, value in SHARED.items() if name != "snr_gamma" or not facts.flow}
    found |= PRESETS[size, full] | (facts.init or {})
    own = facts.default and given.get("prior") is None and given.get("prior_images") != 0
    found |= _prior(full) if own else {}
    micro, accumulation, checkpointing = BATCHES[size, "cpu" if facts.device == "cpu" else "gpu"]
    if facts.memory is not None and facts.memory < ROOMY.get(size, 0):
        micro, accumulation, checkpointing = 1, micro * accumulation, True
    found |= {"batch_size": max(1, min(micro, sum(groups))), "accumulation": accumulation}
    found |= {"gradient_checkpointing": True} if checkpointing else {}
    found |= given
    found = in_steps(found, given, groups)
    passes, least, most = LENGTHS[size, full]
    found.setdefault("steps", min(max(round(passes * _epoch(found, groups)), least), most))
    steps = _positive(found["steps"])
    for name, value in {
        "warmup": min(100, steps // 20),
        "ema": 0.0 if steps < 20 else round(min(0.9995, 1 - 10 / steps), 4),
        "validate_every": max(1, min(1000, steps // 8)),
        "save_every": max(1, min(1000, steps // 8)),
        "log_every": max(1, min(20, steps // 20)),
    }.items():
        found.setdefault(name, value)
    return found


def _prior(full: bool) -> dict[str, Any]:
    return PRIOR if full else PRIOR | {"prior_target": "model"}


def in_steps(found: Mapping[str, Any], given: Mapping[str, Any], groups: Sequence[int]) -> dict[str, Any]:
    """`found` with the epochs of `given`, of so many samples in each bucket, as steps."""
    found = {key: value for key, value in found.items() if key != "epochs"}
    if given.get("epochs") is not None:
        epochs = given["epochs"]
        good = isinstance(epochs, (int, float)) and not isinstance(epochs, bool) and 0 < epochs < math.inf
        require(good, f"must be a positive number, got {epochs!r:.80}", "epochs")
        found["steps"] = max(1, math.ceil(epochs * _epoch(found, groups)))
    return found


def _epoch(found: Mapping[str, Any], groups: Sequence[int]) -> float:
    """Steps of an epoch: its batches, of which `accumulation` make one."""
    size = _positive(found["batch_size"])
    return sum(math.ceil(count / size) for count in groups) / _positive(found["accumulation"])


def before_data(given: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """What has to be known before the data is read: how large the pictures are taken."""
    return {"data.resolution": facts.side, **given}


def _positive(value: Any) -> float:
    """A number above 0 to go on with; what is none is refused where the settings are built."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    return value if good else 1


def read_facts(model: str, init: str | None, device: str) -> Facts:
    """Of a model's settings, its weights unread, and of a LoRA's header. Raises ModelError, ConfigError."""
    import torch

    from ldm.checkpoint.model import check_model
    from ldm.device import pick_device

    place = check_model(model)
    configs = _configs(place)
    unet, vae = configs["unet"], configs["vae"]
    widths, factor = unet.get("block_out_channels", (320,)), 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1)
    found = pick_device(device)
    memory = torch.cuda.get_device_properties(found).total_memory if found.type == "cuda" else None
    return Facts(
        width=widths[0],
        xl=unet.get("addition_embed_type") == "text_time",
        side=(unet.get("sample_size") or 64) * factor,
        flow="flow" in str(configs["scheduler"].get("prediction_type", "")),
        device=found.type,
        memory=memory,
        default=model == "default",
        init=None if init is None else settings_of_lora(_read_header(init)),
    )


def _read_header(init: str) -> Any:
    """Of the LoRA to go on from; says what had to be assumed."""
    from ldm.checkpoint.lora import read_lora_header

    header = read_lora_header(init)
    if header.assumed:
        say(f"{header.path}: {header.assumed} layers tell no alpha; it is taken to be the rank")
    return header


def _configs(place: Path) -> dict[str, Mapping[str, Any]]:
    from ldm.checkpoint.model import is_single
    from ldm.checkpoint.safety import read_json
    from ldm.checkpoint.single import plan_of

    if is_single(place):
        return {"vae": {}, "scheduler": {}, **plan_of(place, "epsilon", ("vae",)).configs}
    names = {"unet": "unet/config.json", "vae": "vae/config.json", "scheduler": "scheduler/scheduler_config.json"}
    return {part: read_json(place / name) for part, name in names.items()}


def settings_of_lora(header: Any) -> dict[str, Any]:
    """What a run that goes on from this LoRA is told: its kind, its commonest rank and alpha, where its layers are."""
    from collections import Counter

    entries = list(header.entries.values())
    (rank, alpha), _ = Counter((entry.rank, entry.alpha) for entry in entries).most_common(1)[0]
    text = any(name.startswith(("lora_te", "text_encoder")) for name in header.entries)
    kind = "dora" if header.dora else "lora"
    return {"train": kind, "lora_rank": rank, "lora_alpha": alpha, "targets": [], "text_encoder": text}


def command(found: Mapping[str, Any], out: str | Path) -> str:
    """The command line that asks for exactly these settings, presets and all."""
    options = {word for group in OPTIONS.values() for word in group}
    words = {KEYS[word]: word for word in KEYS if word in options and word not in ("epochs", "prompts_file")}
    parts = ["ldm", "finetune", str(found.get("data.folder", "DATA")), "-o", str(out)]
    for key, value in found.items():
        option = f"--{words[key].replace('_', '-')}" if key in words else ""
        if key in ("data.folder", "stage") or (value == [] and key != "report_to"):
            continue
        if (value is None and key not in SHARED) or (key in OF_LORA and found.get("train") == "full"):
            continue  # as where it is not said
        if key == "validation_prompts":
            for prompt in value:
                parts += _with_value(option, str(prompt))
        elif words.get(key) in SWITCHES:
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
