"""The settings of a distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ldm.config import require
from ldm.diffusion.guidance.settings import MAX_SCALE
from ldm.training.settings.base import Settings
from ldm.training.settings.finetune import MAX_SAMPLES, FinetuneSettings, check_file_name
from ldm.training.settings.finetune_data import DataSettings
from ldm.training.settings.stages import check_pool

MOST_INTERVALS, MOST_SEGMENTS, MOST_TEACHER_STEPS = 1024, 50, 200


@dataclass(frozen=True, kw_only=True)
class DistillSettings(Settings):
    """How a model learns to do without guidance, or in few steps, what it does now."""

    stage: Literal["distill"] = "distill"
    steps: int = 2000
    batch_size: int = 16
    learning_rate: float = 5e-4
    ema: float = 0.95  # of the target of `consistency` too
    save_every: int = 500
    validate_every: int = 500
    data: DataSettings = field(default_factory=DataSettings)  # images, or drawn scenes
    model: str = "default"  # type: ignore[assignment]  # the teacher: "default", a folder, a single file, a hub id
    vae: str | None = None  # another autoencoder's folder or file
    prompts: str | None = None  # in place of data: a file with a caption a line, of which the teacher draws images
    drawn: int = 0  # how many it draws; 0: one of each line
    init: str | None = None  # a LoRA of this model to begin with; with it the model is the teacher
    method: Literal["guidance", "consistency", "trajectory"] = "consistency"  # no guidance; few steps; both
    train: Literal["lora", "full"] = "lora"
    lora_rank: int = 16
    lora_alpha: float | None = None  # None: the rank
    targets: tuple[str, ...] = ("all",)  # names of layers or their ends, or words of ldm.nn.lora.TARGETS
    guidance_scale: float | None = None  # the teacher's; None: the model's, without any where init is distilled already
    guidance_range: tuple[float, float] | None = None  # train=full, guidance: any scale from-to; the U-Net is told it
    segments: int = 4  # consistency, trajectory: steps to draw with
    teacher_steps: int = 20  # trajectory: steps of dpmpp_2m by which the teacher draws; a multiple of `segments`
    intervals: tuple[int, int] = (1, 16)  # consistency: how finely a segment is cut, at first and at last
    timesteps: Literal["uniform", "logit_normal"] = "uniform"  # guidance: noise levels
    timestep_shift: float = 1.0
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    attention: str = "auto"  # of the U-Net: a name of ldm.nn.attention.BACKENDS
    validation_prompts: tuple[str, ...] = ()  # of the sample grid; none: captions of held-out images
    samples: int = 8  # images in the grid, and of which the distance to the teacher's is measured
    latent_pool: int = 2048  # drawn scenes in use, a multiple of 256
    renew: int = 64  # steps after which 256 of them are replaced; 0: never
    validation: int = 64  # held-out scenes
    save_dtype: Literal["fp32", "bf16", "fp16"] | None = None  # None: fp16 for a LoRA, bf16 for a model
    name: str | None = None  # of kohya's file; None: that of the run's folder

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.network  # raises ConfigError for settings that a fine-tuning has too
        require(0 <= self.samples <= MAX_SAMPLES, f"must be 0 to {MAX_SAMPLES}, got {self.samples}", "samples")
        require(0 <= self.noise_offset < 10, f"must be 0 to 10, got {self.noise_offset}", "noise_offset")
        for name in ("timestep_shift", "snr_gamma"):
            value = getattr(self, name)
            require(value is None or value > 0, f"must be positive, got {value}", name)
        require(1 <= self.segments <= MOST_SEGMENTS, f"must be 1 to {MOST_SEGMENTS}, got {self.segments}", "segments")
        if self.method == "trajectory":
            self._check_teacher()
        first, last = self.intervals
        fits = 1 <= first <= last <= MOST_INTERVALS
        require(fits, f"must be 1 to {MOST_INTERVALS}, the first not above the last, got {first}, {last}", "intervals")
        require(0 <= self.drawn <= 100_000, f"must be 0 to 100,000, got {self.drawn}", "drawn")
        require(self.prompts is not None or not self.drawn, "needs prompts, which are drawn", "drawn")
        require(not (self.prompts and self.data.folder), "contradicts data.folder: give one of them", "prompts")
        self._check_scales()
        if self.name:
            check_file_name(self.name, "name")
        if not self.data.folder or self.method == "trajectory":
            check_pool(self.latent_pool, self.renew)

    def _check_teacher(self) -> None:
        steps, parts = self.teacher_steps, self.segments
        require(1 <= steps <= MOST_TEACHER_STEPS, f"must be 1 to {MOST_TEACHER_STEPS}, got {steps}", "teacher_steps")
        require(steps % parts == 0, f"must be a multiple of segments={parts}, got {steps}", "teacher_steps")

    def _check_scales(self) -> None:
        scale, scales = self.guidance_scale, self.guidance_range
        require(scale is None or 0 < scale <= MAX_SCALE, f"must be 0 to {MAX_SCALE:g}, got {scale}", "guidance_scale")
        if scales is None:
            return
        whole = self.train == "full" and self.method == "guidance"
        require(whole, "needs train=full and method=guidance: a LoRA cannot be told the scale", "guidance_range")
        low, high = scales
        fits = 1 <= low < high <= MAX_SCALE
        require(fits, f"must rise from 1 or more to at most {MAX_SCALE:g}, got {low:g}, {high:g}", "guidance_range")

    @property
    def network(self) -> FinetuneSettings:
        """What is trained of which model, as a fine-tuning has it."""
        names = ("model", "vae", "init", "train", "lora_rank", "lora_alpha", "targets", "attention", "name")
        names += ("gradient_checkpointing", "steps", "batch_size", "learning_rate", "seed", "device", "precision")
        return FinetuneSettings(**{name: getattr(self, name) for name in names})
