"""The tables that the presets of a fine-tuning are taken from."""

from __future__ import annotations

from typing import Any

# (size, train=full): passes over the images, and the fewest and the most steps.
LENGTHS = {
    ("small", False): (200, 400, 4000),
    ("small", True): (300, 400, 8000),
    ("sd", False): (100, 400, 3000),
    ("sd", True): (50, 400, 10_000),
    ("xl", False): (80, 400, 3000),
    ("xl", True): (40, 400, 10_000),
    ("flow", False): (80, 400, 3000),
    ("flow", True): (40, 400, 10_000),
}
# A small model keeps shapes in its convolutions, and finds them at high noise, which min-SNR takes weight from: after
# 800 steps on 24 images of a new thing, 19 of 20 prompts were right, and 3 of 20 without all this.
SHAPES: dict[str, Any] = {"timesteps": "logit_normal", "timestep_shift": 2.0, "snr_gamma": None}
PRESETS: dict[tuple[str, bool], dict[str, Any]] = {
    ("small", False): {"learning_rate": 1.2e-3, "lora_rank": 32, "targets": ["all"], **SHAPES},
    ("small", True): {"learning_rate": 2e-4, **SHAPES},
    ("sd", False): {"learning_rate": 1e-4, "lora_rank": 16, "targets": ["attention"]},
    ("sd", True): {"learning_rate": 1e-5},
    ("xl", False): {"learning_rate": 1e-4, "lora_rank": 16, "targets": ["attention"]},
    ("xl", True): {"learning_rate": 1e-5},
    ("flow", False): {"learning_rate": 1e-4, "lora_rank": 16, "targets": ["attention"]},
    ("flow", True): {"learning_rate": 1e-5},
}
# Of ControlNets, beside what train=full has: diffusers' script and the authors take 1e-5 for Stable Diffusion.
CONTROL: dict[str, dict[str, Any]] = {
    "small": {"train": "control", "learning_rate": 5e-4},
    "sd": {"train": "control", "learning_rate": 1e-5},
    "xl": {"train": "control", "learning_rate": 1e-5},
    "flow": {"train": "control", "learning_rate": 1e-5},  # refused where the model is known
}
# Of every flow transformer: the noise levels of SD3's paper (Esser et al. 2024, section 3.1), with the shift that the
# model is drawn with. Text embeddings of T5 are long, up to 4 MB in 16 bits; the encoders give no more than 16 bits of
# them that matter.
FLOW: dict[str, Any] = {"timesteps": "logit_normal", "timestep_shift": None, "snr_gamma": None}
FLOW |= {"data.cache_dtype": "bf16"}
# (size, device): micro-batch, accumulation, gradient checkpointing; on a GPU with its memory in GB.
BATCHES = {
    ("small", "cpu"): (4, 1, False),
    ("small", "gpu"): (16, 1, False),
    ("sd", "cpu"): (1, 4, False),
    ("sd", "gpu"): (4, 1, False),
    ("xl", "cpu"): (1, 4, True),
    ("xl", "gpu"): (1, 4, True),
    ("flow", "cpu"): (1, 4, True),
    ("flow", "gpu"): (1, 4, True),
}
# (size, train=full): bytes of a GPU from which on the batch above fits without checkpointing. With train=full each
# weight takes 20 bytes (itself, gradient, average and two moments in fp32): SD 1.5's 17 GB, XL's 51 GB in all.
ROOMY = {("sd", False): 16e9, ("xl", False): 40e9, ("sd", True): 40e9, ("xl", True): 100e9}
SHARED = {"snr_gamma": 5.0, "lr_schedule": "cosine"}
# Without a prior the default model forgets what it knew, and draws the new images unasked. Of 50 old prompts that were
# right, none were still right after a new thing without a prior, 45 with drawn images as the target, and 49 with what
# the model predicted on them.
PRIOR = {"prior_images": 320, "prior_weight": 3.0, "data.caption_dropout": 0.0}
