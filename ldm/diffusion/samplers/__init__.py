"""Samplers: pure functions from noise to image, over one denoiser and one list of sigmas.

Each takes (denoise, x, sigmas, noise=…, callback=None) and returns x at the last sigma, which is x0 where that is 0.
  denoise(x (B, C, H, W), sigma (B,)) -> x0
  x (B, C, H, W) = x0 + sigma * noise, scaled by Schedule.initial
  sigmas (n + 1,) descending, on the CPU, so that asking whether one is 0 costs no wait for the device
  noise(i) -> the i-th fresh draw (B, C, H, W), standard normal, for samplers that add noise
  callback(i, x, x0) after each step, with the x0 found at the step's beginning
  eta=…  how much noise the samplers of `names.ETA` add: 0 none, 1 as much as the reverse diffusion itself (tcd: all)
`ldm.diffusion.denoiser.sample` runs one, without gradients.
Importing this folder does not import torch, so that --help can list SAMPLERS.
"""

from ldm.diffusion.samplers import deterministic, stochastic
from ldm.diffusion.samplers.base import SAMPLERS, sampler

__all__ = ["SAMPLERS", "deterministic", "sampler", "stochastic"]
