"""Guidance: what is made of the network's answers with and without a prompt, before the denoiser turns it into x0.

Importing this imports no torch, so that --help can list GUIDANCES.
"""

from ldm.diffusion.guidance.guided import cfg, guide
from ldm.diffusion.guidance.settings import GUIDANCES, Guidance

__all__ = ["GUIDANCES", "Guidance", "cfg", "guide"]
