"""What a training run can be told: frozen dataclasses, one a stage, read from YAML and KEY=VALUE."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ldm import config
from ldm.config import require
from ldm.errors import ConfigError, nearest


@dataclass(frozen=True)
class DataSettings:
    """Where pictures and captions come from: emoji scenes drawn on the fly, or the user's own imagefolder."""

    folder: str | None = None  # captioned imagefolder; None: emoji scenes
    resolution: int = 128  # pixels, square
    font: str | None = None  # NotoColorEmoji.ttf; None: where the package fonts-noto-color-emoji puts it
    scenes: dict[str, Any] = field(default_factory=dict)  # fields of ldm.data.emoji.SceneConfig


@dataclass(frozen=True)
class Settings:
    """The fields that every stage shares."""

    stage: str
    steps: int
    batch_size: int
    learning_rate: float
    data: DataSettings = DataSettings()
    model: dict[str, Any] = field(default_factory=dict)  # the network's config
    accumulation: int = 1  # micro-batches of batch_size a step
    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 100  # steps of linear warm-up
    decay_from: float = 0.6  # fraction of the steps after which the learning rate falls linearly
    final_lr: float = 0.02  # fraction of the learning rate that is left at the last step
    clip: float = 1.0  # gradient norm
    ema: float = 0.9995
    seed: int = 0
    workers: int = 1  # processes that draw or read pictures
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where it is faster
    save_every: int = 1000  # steps
    validate_every: int = 1000  # steps
    log_every: int = 20  # steps
    keep: int = 2  # checkpoints

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "save_every", "validate_every", "log_every"):
            require(getattr(self, name) >= 1, f"must be at least 1, not {getattr(self, name)}", name)
        require(self.learning_rate > 0, "must be positive", "learning_rate")
        require(0 <= self.ema < 1, "must be in [0, 1)", "ema")
        require(0 <= self.decay_from <= 1, "must be in [0, 1]", "decay_from")
        require(0 <= self.final_lr <= 1, "must be in [0, 1]", "final_lr")
        require(self.clip > 0, "must be positive", "clip")
        require(self.warmup >= 0 and self.workers >= 0, "must not be negative", "warmup, workers")
        require(all(0 <= b < 1 for b in self.betas), "must be in [0, 1)", "betas")
        require(self.weight_decay >= 0, "must not be negative", "weight_decay")
        require(getattr(self, "validation", 1) >= 1, "must be at least 1", "validation")
        require(self.keep >= 2, "must be at least 2, so that one good checkpoint is always left", "keep")


@dataclass(frozen=True)
class AutoencoderSettings(Settings):
    """Pictures to latents and back."""

    init: str | None = None  # another run or a diffusers folder to start from
    crop: int = 0  # train on square crops of this size, placed around what is drawn; 0: whole pictures
    crops: int = 1  # crops taken from each picture
    crop_until: float = 1.0  # fraction of the steps after which whole pictures are used (GroupNorm sees more there)
    l1: float = 1.0
    mse: float = 1.0
    gradient: float = 1.0  # L1 of the differences between neighbouring pixels
    kl: float = 1e-6
    freeze_encoder: bool = False  # train the decoder alone: the latents stay what they were
    validation: int = 200  # held-out scenes

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.data.resolution
        factor = 2 ** (len(self.model.get("block_out_channels", (64,))) - 1)
        require(size % factor == 0, f"{size} is not a multiple of the autoencoder's {factor}", "data.resolution")
        require(0 <= self.crop <= size and self.crop % factor == 0, f"must be 0 to {size} by {factor}", "crop")
        fits = self.crops >= 1 and self.batch_size % self.crops == 0
        require(fits, f"must divide batch_size {self.batch_size}, got {self.crops}", "crops")
        for name in ("use_quant_conv", "use_post_quant_conv"):  # they take the scale of the latents
            require(self.model.get(name, True), "is needed", f"model.{name}")


@dataclass(frozen=True)
class TextSettings(Settings):
    """A small CLIP: text tower and image tower on latents, by contrast."""

    vae: str = ""  # run or folder with the autoencoder
    vocabulary: int = 2048  # BPE entries
    max_length: int = 40  # tokens, start and end included
    tokenizer_captions: int = 20000  # captions that the BPE is trained on
    image_tower: dict[str, Any] = field(default_factory=dict)  # fields of CLIPVisionConfig
    bank: int = 8192  # latents kept in memory
    renew: int = 0  # steps after which 256 of them are replaced; 0: never
    validation: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.vae), NEEDED.format("autoencoder", "vae"), "vae")
        _check_bank(self.bank, self.renew)


@dataclass(frozen=True)
class UNetSettings(Settings):
    """The denoiser, on a bank of cached latents and text embeddings."""

    vae: str = ""
    text: str = ""
    init: str | None = None  # another run (its EMA weights) or a diffusers folder to start from
    compile: bool = False  # torch.compile: needs a C++ compiler on a CPU, a minute at the start
    schedule: dict[str, Any] = field(default_factory=dict)  # fields of ldm.diffusion.schedule.Schedule
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    timestep_shift: float = 1.0  # above 1: more often at high noise, where the text decides
    snr_gamma: float | None = None
    caption_dropout: float = 0.1
    bank: int = 4096
    renew: int = 64  # steps after which 256 latents of the bank are replaced
    sampler: str = "ddim"  # of the sample grid and of the exported model
    sample_steps: int = 25
    guidance_scale: float = 4.0
    validation: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.timestep_shift > 0, f"must be positive, got {self.timestep_shift}", "timestep_shift")
        require(0 <= self.caption_dropout < 1, "must be in [0, 1)", "caption_dropout")
        require(1 <= self.sample_steps <= 1000, f"must be 1 to 1000, got {self.sample_steps}", "sample_steps")
        require(bool(self.vae), NEEDED.format("autoencoder", "vae"), "vae")
        require(bool(self.text), NEEDED.format("text", "text"), "text")
        _check_bank(self.bank, self.renew)


PIECE = 256  # latents that are renewed together
NEEDED = "is needed: the run of `ldm train emoji/{}`, or a model's folder ({}=RUN)"


def _check_bank(bank: int, renew: int) -> None:
    require(bank % PIECE == 0 and bank > 0, f"must be a multiple of {PIECE}", "bank")
    require(renew >= 0, f"must not be negative, got {renew}", "renew")


SETTINGS = {"autoencoder": AutoencoderSettings, "text": TextSettings, "unet": UNetSettings}
# What may differ between a run and its continuation without being asked for by name.
FREE = {"steps", "learning_rate", "warmup", "decay_from", "final_lr", "workers", "device"}
FREE |= {"save_every", "validate_every", "log_every", "keep"}


def packaged_configs() -> Path:
    """The folder of the shipped settings: `configs/` of the checkout, or its copy in the wheel."""
    from ldm.checkpoint import shipped

    return shipped("configs")


def read_settings(source: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Settings from a packaged name (`emoji/unet`) or a file, with KEY=VALUE on top.

    Raises ConfigError for an unknown name, stage, key or value.
    """
    path = Path(source)
    if not path.suffix:
        folder = packaged_configs()
        names = {p.relative_to(folder).with_suffix("").as_posix(): p for p in sorted(folder.rglob("*.yaml"))}
        if str(source) not in names:
            raise ConfigError(f"no packaged settings {str(source)!r}", where="config", todo=nearest(str(source), names))
        path = names[str(source)]
    overrides = [f"data.folder={word[5:]}" if word.startswith("data=") else word for word in overrides]
    mapping = config.override(config.load(path), overrides)
    stage = mapping.get("stage")
    if stage not in SETTINGS:
        raise ConfigError(f"unknown stage {stage!r}", where=f"{path}: stage", todo=nearest(str(stage), SETTINGS))
    try:
        return config.build(SETTINGS[stage], mapping)
    except ConfigError as error:
        raise ConfigError(str(error), where=path) from None


def changed(old: dict[str, Any], new: Settings) -> dict[str, tuple[Any, Any]]:
    """The settings, by name, that a continuation would change and that change what is trained: name → (old, new)."""
    now, before = as_dict(new), {**_defaults(type(new)), **old}
    return {k: (old.get(k), v) for k, v in now.items() if k not in FREE and before.get(k) != v}


def _defaults(kind: type[Settings]) -> dict[str, Any]:
    """What a setting was before it existed: its default."""
    return {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}


def as_dict(settings: Settings) -> dict[str, Any]:
    """The settings as plain JSON values."""
    import json

    return json.loads(json.dumps(dataclasses.asdict(settings)))
