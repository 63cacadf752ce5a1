"""Single files: a whole model in one .safetensors under Stable Diffusion's original names, read and written."""

from ldm.checkpoint.single.header import stored_settings
from ldm.checkpoint.single.read import Plan, plan_of, read_single, read_vae, vae_facts
from ldm.checkpoint.single.vae_sizes import vae_sizes
from ldm.checkpoint.single.write import SUFFIX, check_target, save_single

__all__ = ["SUFFIX", "Plan", "check_target", "plan_of", "read_single", "read_vae"]
__all__ += ["save_single", "stored_settings", "vae_facts", "vae_sizes"]
