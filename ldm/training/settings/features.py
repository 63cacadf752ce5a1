"""The checks of settings of a prior, of a ControlNet, and of training all weights, where a fine-tuning has some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ldm.config import require
from ldm.errors import ConfigError

if TYPE_CHECKING:
    from ldm.training.settings.finetune import FinetuneSettings

# Settings of a LoRA, and their values in the settings.json of every run, which say nothing with train=full.
LORA_ONLY = {"lora_rank": (None, 16), "lora_alpha": (None,), "targets": (None, ["attention"]), "init": (None,)}
TEACHER_ONLY = "model is for LoRA and DoRA, beside which the original weights are still there: use images"


def check_prior(s: FinetuneSettings) -> None:
    """Raise ConfigError for settings of a prior that exclude each other, or lack something."""
    require(0 <= s.prior_images <= 100_000, f"must be 0 to 100,000, got {s.prior_images}", "prior_images")
    require(not (s.prior and s.prior_images), "contradicts prior: give one of them", "prior_images")
    drawn = s.prior_images or s.prior_prompt is None
    require(drawn, "is for images that the model draws: give prior_images=N too", "prior_prompt")
    any_prior = s.prior or s.prior_images or s.prior_target == "images"
    require(any_prior, "needs a prior: give prior_images=N too, or prior=FOLDER", "prior_target")
    require(s.train != "full" or s.prior_target == "images", TEACHER_ONLY, "prior_target")
    known = s.prior_prompt is not None or s.model == "default" or not s.prior_images
    require(known, 'needs a prompt for the images, such as prior_prompt="a dog"', "prior_images")


def check_control(s: FinetuneSettings) -> None:
    """Raise ConfigError for settings of a ControlNet that exclude others, and for some without one."""
    if s.train != "control":
        require(s.control is None, f"trains a ControlNet, and train is {s.train}: leave that out", "control")
        for name in ("control_init", "control_channels", "control_embedding"):
            require(getattr(s, name) is None, "needs control=KIND or control=FOLDER", name)
        return
    require(bool(s.control), "is needed for train=control: a kind such as edges, or a folder", "control")
    for name in ("control_channels", "control_embedding"):
        widths = getattr(s, name)
        require(widths is None or (widths and min(widths) > 0), f"must be widths, got {widths}", name)
        new = s.control_init is None or widths is None
        require(new, "is that of the ControlNet to go on from: leave it out", name)
    for name in ("init", "text_encoder", "prior", "prior_images", "prediction_type", "zero_terminal_snr"):
        require(not getattr(s, name), "changes the model, which stays as it is beside a ControlNet", name)


def check_lora_only(given: Mapping[str, Any], from_file: Mapping[str, Any], other: str) -> None:
    """Raise ConfigError for settings of a LoRA where all weights are trained, or a ControlNet."""
    trains = "trains all weights" if other == "train=full" else "trains a ControlNet"
    for name, usual in LORA_ONLY.items():
        if given.get(name) is not None or from_file.get(name) not in usual:
            what = f"{name} is for LoRA, and {other} {trains}"
            raise ConfigError(what, hint="leave one of them out")
