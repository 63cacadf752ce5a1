"""The settings of a ControlNet that is trained on drawn scenes, or on images as a fine-tuning has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ldm.training.settings.finetune import FinetuneSettings
from ldm.training.settings.finetune_data import DataSettings
from ldm.training.settings.stages import check_pool


@dataclass(frozen=True, kw_only=True)
class ControlSettings(FinetuneSettings):
    """A fine-tuning's settings for a ControlNet, whose data may be drawn scenes."""

    stage: Literal["control"] = "control"  # type: ignore[assignment]
    train: Literal["control"] = "control"
    control: str = "edges"
    data: DataSettings = field(default_factory=DataSettings)  # type: ignore[assignment]
    latent_pool: int = 4096  # drawn scenes in use, a multiple of 256
    renew: int = 64  # steps after which 256 of them are replaced; 0: never
    validation: int = 64  # held-out scenes

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data.folder:
            check_pool(self.latent_pool, self.renew)
