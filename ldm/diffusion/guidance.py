"""Classifier-free guidance, on the network's raw output, before the denoiser turns it into x0.

Conditions are any objects with len(c) == B and a classmethod cat([...]), such as ldm.nn.text.Conditioning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ldm.errors import ConfigError


def cfg(
    predict: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor],
    cond: Any,
    uncond: Any | None,
    scale: float | torch.Tensor,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Bind conditions: (x (B, C, H, W), timesteps (B,)) -> raw (B, C, H, W) fp32, u + scale (c - u).

    Ho & Salimans 2022, eq. 6, with w = scale - 1.

    predict(x, timesteps, condition) -> raw. Both halves go through the network in one batch of 2 B, the unconditional
    one first. scale is one number or (B,), one a picture; 1 and less mean no guidance, as in diffusers: rows of such
    a scale are the conditional half alone, and where all are, no unconditional half is computed (uncond may be None).
    Raises ConfigError for a scale that is not finite or not one number or one a picture.
    """
    scale = torch.as_tensor(scale, dtype=torch.float32).cpu()
    if not scale.isfinite().all():
        raise ConfigError("guidance_scale must be a finite number", todo="NaN or infinity was given")
    if scale.ndim > 1 or scale.numel() not in (1, len(cond)):
        raise ConfigError(f"guidance_scale has shape {tuple(scale.shape)} for {len(cond)} pictures")
    if (scale <= 1).all():
        return lambda x, timesteps: predict(x, timesteps, cond).float()
    if uncond is None or len(uncond) != len(cond):
        count = "no" if uncond is None else len(uncond)
        raise ConfigError(f"guidance needs one unconditional row a picture: {count} for {len(cond)}")
    both = type(cond).cat([uncond, cond])

    def guided(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        raw = predict(torch.cat([x, x]), torch.cat([timesteps, timesteps]), both)
        u, c = raw.float().chunk(2)
        w = scale.to(x.device).view(-1, *[1] * (x.ndim - 1))
        return torch.where(w > 1, u + w * (c - u), c)

    return guided
