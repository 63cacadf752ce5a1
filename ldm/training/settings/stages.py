"""The settings of the stages that train a model from nothing: autoencoder, text and U-Net."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ldm.config import require
from ldm.diffusion.guidance.settings import MAX_SCALE
from ldm.training.settings.base import Settings


@dataclass(frozen=True)
class AutoencoderSettings(Settings):
    """Images to latents and back."""

    init: str | None = None  # another run or a diffusers folder to start from
    crop: int = 0  # train on square crops of this size, placed around what is drawn; 0: whole images
    crops: int = 1  # crops taken from each image
    crop_until: float = 1.0  # fraction of the steps after which whole images are used (GroupNorm sees more there)
    l1: float = 1.0
    mse: float = 1.0
    gradient: float = 1.0  # L1 of the differences between neighbouring pixels
    kl: float = 1e-6
    freeze_encoder: bool = False  # train the decoder alone: the latents stay what they were
    validation: int = 200  # held-out scenes

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.data.masks, WHOLE, "data.masks")
        for name in ("l1", "mse", "gradient", "kl"):
            require(getattr(self, name) >= 0, f"must not be negative, got {getattr(self, name)}", name)
        require(self.l1 + self.mse + self.gradient > 0, "no image is learned without it, mse or gradient", "l1")
        require(0 <= self.crop_until <= 1, f"must be 0 to 1, got {self.crop_until}", "crop_until")
        self.check_sizes(2 ** (len(self.model.get("block_out_channels", (64,))) - 1))
        fits = self.crops >= 1 and self.batch_size % self.crops == 0
        require(fits, f"must divide batch_size {self.batch_size}, got {self.crops}", "crops")

    def check_sizes(self, factor: int) -> None:
        """Raise ConfigError unless whole images and crops are multiples of the autoencoder's factor."""
        size, step = self.data.resolution, self.data.buckets.step
        require(size % factor == 0, f"{size} is not a multiple of the autoencoder's {factor}", "data.resolution")
        fits = not self.data.folder or self.data.square or step % factor == 0
        require(fits, f"{step} is not a multiple of the autoencoder's {factor}", "data.bucket_step")
        require(0 <= self.crop <= size and self.crop % factor == 0, f"must be 0 to {size} by {factor}", "crop")


@dataclass(frozen=True)
class TextSettings(Settings):
    """A small CLIP: text tower and image tower on latents, by contrast; the text tower may learn to name things."""

    vae: str = ""  # the autoencoder: "default", a run, a folder, a file or a hub id
    vae_subfolder: str | None = None  # where in the folder or repository it is
    vae_scaling_factor: float | None = None  # of a single file that does not tell it: makes its latents' variance 1
    init: str | None = None  # a run or a model's folder whose text encoder and tokenizer to go on from
    contrast: float = 1.0  # weight of the contrast with latents
    naming: float = 0.0  # weight of the linear readers of drawn scenes: object, colour, count, which thing is where
    order: float = 3.0  # weight, within naming, of which of two things is where
    everyday_until: float = 0.25  # fraction of the steps in which those two are everyday things: order is found sooner
    anchor: float = 0.0  # weight of staying what `init` was on the plain words of single things, however they are said
    named: int = 64  # captions of scenes that the readers learn from, a step, beside the contrast's batch
    mirrored: int = 40  # pairs of captions whose two things have changed places, a step
    vocabulary: int = 2048  # BPE entries
    max_length: int = 40  # tokens, start and end included
    tokenizer_captions: int = 20000  # captions that the BPE is trained on
    image_tower: dict[str, Any] = field(default_factory=dict)  # fields of CLIPVisionConfig
    latent_pool: int = 8192  # drawn scenes in use, a multiple of 256
    renew: int = 0  # steps after which 256 of them are replaced; 0: never
    validation: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.vae), NEEDED.format("autoencoder", "vae"), "vae")
        require(
            self.vae_scaling_factor is None or self.vae_scaling_factor > 0, "must be positive", "vae_scaling_factor"
        )
        require(not self.data.masks, WHOLE, "data.masks")
        check_pool(self.latent_pool, self.renew)
        for name in ("contrast", "naming", "order", "anchor", "named", "mirrored"):
            require(getattr(self, name) >= 0, f"must not be negative, got {getattr(self, name)}", name)
        require(0 <= self.everyday_until <= 1, "must be in [0, 1]", "everyday_until")
        for name, least in (("vocabulary", 1), ("max_length", 3), ("tokenizer_captions", 1)):
            require(getattr(self, name) >= least, f"must be at least {least}, got {getattr(self, name)}", name)
        names = self.naming > 0 and not self.data.folder
        require(self.contrast > 0 or names, "nothing is trained without it and without naming", "contrast")
        require(not names or self.named + self.mirrored > 0, "needs captions to read", "named")
        require(not self.anchor or bool(self.init and names), "needs init, and naming of drawn scenes", "anchor")


@dataclass(frozen=True)
class UNetSettings(Settings):
    """The denoiser, trained on latents and text embeddings."""

    vae: str = ""  # the autoencoder: "default", a run, a folder, a file or a hub id (owner/name@revision)
    text: str = ""  # the text encoder with its tokenizer, in the same way; a folder of XL has two
    text_2: str | None = None  # the second of two text encoders
    vae_subfolder: str | None = None  # where in the folder or repository the part is
    vae_scaling_factor: float | None = None  # of a single file that does not tell it: makes its latents' variance 1
    text_subfolder: str | None = None
    text_2_subfolder: str | None = None
    init: str | None = None  # another run (its EMA weights) or a diffusers folder to start from
    text_rate: float = 0.0  # the text encoder's learning rate, trained along; 0: it is frozen
    compile: bool = False  # torch.compile: needs a C++ compiler on a CPU, a minute at the start
    schedule: dict[str, Any] = field(default_factory=dict)  # fields of ldm.diffusion.schedule.Schedule
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    timestep_shift: float = 1.0  # above 1: more often at high noise, where the text decides
    snr_gamma: float | None = None
    flow_contrast: float = 0.0  # flow: weight of the error against another image's target (0.05 is usual); 0: none
    weight_floor: float | None = None  # weigh samples by their measured error, but no less than this; None: all alike
    noise_offset: float = 0.0  # of a number that each channel's noise is shifted by; 0.05 is usual
    latent_pool: int = 4096  # drawn scenes in use, a multiple of 256
    renew: int = 64  # steps after which 256 of them are replaced; 0: never
    sampler: str = "ddim"  # of the sample grid and of the exported model
    sample_steps: int = 25
    guidance_scale: float = 4.0
    validation: int = 256
    validation_levels: int = 0  # parts of the noise levels whose validation loss is told by itself

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.text_rate >= 0, f"must not be negative, got {self.text_rate}", "text_rate")
        require(self.timestep_shift > 0, f"must be positive, got {self.timestep_shift}", "timestep_shift")
        gamma, scale = self.snr_gamma, self.guidance_scale
        require(gamma is None or gamma > 0, f"must be positive, got {gamma}", "snr_gamma")
        require(0 < scale <= MAX_SCALE, f"must be above 0, at most {MAX_SCALE:g}, got {scale}", "guidance_scale")
        require(0 <= self.noise_offset < 10, f"must be 0 to 10, got {self.noise_offset}", "noise_offset")
        floor = self.weight_floor
        require(floor is None or 0 < floor <= 1, f"must be above 0, at most 1, got {floor}", "weight_floor")
        require(0 <= self.flow_contrast < 1, f"must be in [0, 1), got {self.flow_contrast}", "flow_contrast")
        flow = self.schedule.get("prediction_type") == "flow"
        require(flow or not self.flow_contrast, "is for flow: set schedule.prediction_type=flow", "flow_contrast")
        levels = self.validation_levels
        require(0 <= levels <= 20, f"must be 0 to 20, got {levels}", "validation_levels")
        require(1 <= self.sample_steps <= 1000, f"must be 1 to 1000, got {self.sample_steps}", "sample_steps")
        require(bool(self.vae), NEEDED.format("autoencoder", "vae"), "vae")
        require(
            self.vae_scaling_factor is None or self.vae_scaling_factor > 0, "must be positive", "vae_scaling_factor"
        )
        require(bool(self.text), NEEDED.format("text", "text"), "text")
        check_pool(self.latent_pool, self.renew)


WHOLE = "is for the U-Net: this stage learns whole images"
PIECE = 256  # latents that are renewed together
NEEDED = "is needed: the run of `ldm train emoji/{}`, a folder, a hub id or default ({}=…)"


def check_pool(size: int, renew: int) -> None:
    require(size % PIECE == 0 and size > 0, f"must be a multiple of {PIECE}", "latent_pool")
    require(renew >= 0, f"must not be negative, got {renew}", "renew")
