"""Guidance: what is made of the network's answers with and without a prompt, before they become x0.

Importing this imports no torch, so that --help can list GUIDANCES; `guided.guided_denoiser` does the work.
"""

from ldm.diffusion.guidance.settings import GUIDANCES, Guidance

__all__ = ["GUIDANCES", "Guidance"]
