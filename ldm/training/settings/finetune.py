"""The settings of a fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from ldm.config import require
from ldm.training.settings.base import Settings
from ldm.training.settings.features import check_control, check_prior
from ldm.training.settings.finetune_data import FinetuneData

KINDS = ("lora", "dora", "full")
MAX_SAMPLES = 64
DIFFUSERS_NAME = "pytorch_lora_weights"  # of the LoRA's file for diffusers
SUFFIX = ".safetensors"
MAX_NAME = 255 - len(SUFFIX)  # bytes
FULL_ONLY = "a LoRA cannot change what the model was trained for: use train=full"
POSITIVE = ("lora_alpha", "timestep_shift", "embedded_guidance", "snr_gamma", "prior_weight", "guidance_scale")
POSITIVE += ("sample_steps",)


def lora_name(name: str) -> str:
    """The name of kohya's file without its suffix, which some give with it."""
    return name[: -len(SUFFIX)] if name.lower().endswith(SUFFIX) and len(name) > len(SUFFIX) else name


def check_file_name(name: str, where: str) -> None:
    """Raise ConfigError where `name` cannot be that of kohya's file, which lies beside diffusers'."""
    name = lora_name(name)
    require(name.lower() != DIFFUSERS_NAME, f"{name} is the name of diffusers' file: choose another", where)
    short = len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME
    require(short, f"{name[:40]}… is too long for the name of a file: take at most {MAX_NAME} bytes", where)


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(Settings):
    """How an existing model is trained on the user's images: as a whole, or by low-rank updates of some layers."""

    stage: Literal["finetune"] = "finetune"
    data: FinetuneData = field(default_factory=FinetuneData)
    model: str = "default"  # "default", a diffusers folder, a single file, a hub id
    vae: str | None = None  # another autoencoder's folder or file
    text_encoders: tuple[str, ...] = ()  # what a single file of SD3 or FLUX lacks of CLIP and T5: files, folders
    init: str | None = None  # a LoRA or DoRA to continue; its ranks, alphas and layers are used
    train: Literal["lora", "dora", "full", "control"] = "lora"  # full: every weight of the U-Net
    control: str | None = None  # train=control: what a ControlNet sees, a kind of ldm.control or a folder of images
    control_init: str | None = None  # a ControlNet to go on from; None: the U-Net's own way down
    control_channels: tuple[int, ...] | None = None  # widths of its levels; None: the U-Net's, with its weights
    control_embedding: tuple[int, ...] | None = None  # widths of what reads the control image; None: 16, 32, 96, 256
    lora_rank: int = 16
    lora_alpha: float | None = None  # None: the rank; the update is scaled by alpha / rank
    targets: tuple[str, ...] = ("attention",)  # names of layers or their ends, or words of ldm.nn.lora.TARGETS
    text_encoder: bool = False  # train it too: CLIP alone; with train=full all of its weights
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"] | None = None  # None: the model's
    zero_terminal_snr: bool = False  # rescale the schedule (train=full), so that the last timestep is pure noise
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    timestep_shift: float | None = 1.0  # above 1: more often at high noise; None: the flow model's own, by image size
    embedded_guidance: float = 1.0  # what a model is told in training that has the guidance's scale as an input
    snr_gamma: float | None = None  # min-SNR weighting of the loss; 5 is usual
    noise_offset: float = 0.0  # of a number that each channel's noise is shifted by; 0.05 is usual
    prior: str | None = None  # captioned images of what the model knows, trained in each step so that it is kept
    prior_images: int = 0  # instead of `prior`: the number of images that the model draws before it is trained
    prior_prompt: str | None = None  # what those show; None: what the default model was trained on
    prior_weight: float = 1.0
    prior_target: Literal["images", "model"] = "images"  # model: learn what the model predicted before, not the images
    compile: bool = False  # torch.compile of the U-Net: needs a C++ compiler on a CPU, a minute or more at the start
    attention: str = "auto"  # of the U-Net: a name of ldm.nn.attention.BACKENDS
    validation_prompts: tuple[str, ...] = ()  # of the sample grid; none: captions of held-out images
    samples: int = 8  # images in the grid, where the captions are drawn
    sampler: str | None = None  # of the grid; None: the model's, as the next two
    sample_steps: int | None = None
    guidance_scale: float | None = None
    export: Literal["last", "best"] = "last"  # best: the checkpoint with the lowest validation loss
    save_dtype: Literal["fp32", "bf16", "fp16"] | None = None  # None: fp32 for LoRA and DoRA, bf16 for a model
    name: str | None = None  # of kohya's file; None: that of the run's folder

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.model), "is empty: name a folder, or leave it out", "model")
        require(self.lora_rank >= 1, f"must be at least 1, got {self.lora_rank}", "lora_rank")
        for name in POSITIVE:
            value = getattr(self, name)
            require(value is None or value > 0, f"must be positive, got {value}", name)
        require(0 <= self.noise_offset < 10, f"must be 0 to 10, got {self.noise_offset}", "noise_offset")
        require(0 <= self.samples <= MAX_SAMPLES, f"must be 0 to {MAX_SAMPLES}, got {self.samples}", "samples")
        require(all(self.targets), "one of them is empty", "targets")
        require(bool(self.targets or self.init), "names no layer", "targets")
        require(not self.name or ("/" not in self.name and self.name[0] not in ".-"), "is no name of a file", "name")
        if self.name:
            check_file_name(self.name, "name")
        if self._asks_for("prior"):
            check_prior(self)
        full = self.train == "full"
        require(not (full and self.init), "is a LoRA: it cannot be continued with train=full", "init")
        require(full or not self.zero_terminal_snr, FULL_ONLY, "zero_terminal_snr")
        require(full or self.prediction_type != "flow", FULL_ONLY, "prediction_type")
        if self.train == "control" or self._asks_for("control"):
            check_control(self)
        twice = self.prediction_type == "flow" and self.zero_terminal_snr
        require(not twice, "does not go with flow, whose last step is pure noise already", "zero_terminal_snr")

    def _asks_for(self, feature: str) -> bool:
        """Whether a setting of this name, or with a name that begins with it, is not what it is by default."""
        return any(getattr(self, f.name) != f.default for f in fields(self) if f.name.startswith(feature))

    @property
    def module(self) -> str:
        """A ControlNet and a prior have modules of their own."""
        return "control" if self.control else "prior" if self.prior or self.prior_images else self.stage

    @property
    def alpha(self) -> float:
        return float(self.lora_rank if self.lora_alpha is None else self.lora_alpha)
